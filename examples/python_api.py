"""Use a trained prompt from Python: run the cells of a notebook, or the file as a script.

    python examples/python_api.py [RUN_DIR]

RUN_DIR is the output folder of a run: default runs/quickstart, which the quickstart writes.
"""

# %% A run and its prompts. Nothing heavy is imported yet.
import sys

from trainer.api import load_base, load_run

run = load_run(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
for prompt in run.prompts.values():
    print(prompt)
prompt = next(iter(run.prompts.values()))

# %% The trained values, as a tensor: [virtual tokens, width].
print(prompt.tensor.shape)

# %% The base is loaded once, in this process.
base = load_base(run)

# %% Generate: the text fills the template that the prompt was trained with.
texts = ["Chest pain since noon.", "Blood sugar is high after meals."]
for text, answer in zip(texts, base.generate(texts, prompt=prompt.name), strict=True):
    print(f"{text} -> {answer}")

# %% The same texts without a prompt, in the same template.
print(base.generate(texts, task=prompt.task.name, max_new_tokens=8))

# %% Predict rows: the most likely choice, its probability, and the loss of rows with a target.
rows = [{"text": texts[0], "label": "cardiac"}, {"text": texts[1], "label": "metabolic"}]
for row, made in zip(rows, base.score(rows, prompt=prompt.name), strict=True):
    shares = {choice: round(share, 3) for choice, share in (made.probabilities or {}).items()}
    print(f"{row['text']} -> {made.prediction} {shares}, loss {made.nll:.4f}")

# %% Free the memory; `with load_base(run) as base:` does it at the end of the block.
base.close()
