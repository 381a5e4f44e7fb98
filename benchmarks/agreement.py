"""Difference between the scores of ``promptshard evaluate`` and those of transformers and PEFT.

    promptshard evaluate RUN_DIR --shots 2
    python -m benchmarks.agreement RUN_DIR ... [--rows 8]

Reads the predictions of the evaluation, and computes the log-likelihood of every choice again: with
the model in fp32 by transformers, the adapters by PEFT, and dialogues by the tokenizer's own chat
template. Nothing is packed, and no code of the trainer is used but that which reads the run file.
Needs a run with ``base.quantization: none`` whose tasks have ``chat: true``, choices and one column
``text``. Writes a table to benchmarks/results/agreement.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.config import RunConfig, Task, load_output

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "agreement.md"
MARK = "\ue000"

Messages = list[dict[str, str]]


class Reference:
    """A model of transformers that scores the choices of a task, one text after the other."""

    def __init__(self, config: RunConfig, task: Task, adapter: Path | None = None) -> None:
        model = AutoModelForCausalLM.from_pretrained(config.base.model, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, adapter) if adapter else model
        self.tokenizer = AutoTokenizer.from_pretrained(config.base.model)
        self.model.eval()
        self.task = task

    def asked(self, row: dict[str, Any]) -> str:
        return self.task.input.replace("{text}", row["text"])

    def written(self, messages: Messages) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.no_grad()
    def scores(self, text: str) -> list[float]:
        """Return the log-likelihood of each choice and the end of the turn, after a text."""
        scores = []
        for choice in self.task.choices or ():
            before = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = self.tokenizer(choice + self.tokenizer.eos_token, add_special_tokens=False)[
                "input_ids"
            ]
            ids = torch.tensor([before + answer])
            logits_1TV = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            likely_AV = logits_1TV[0, -len(answer) - 1 : -1].log_softmax(-1)
            scores.append(likely_AV[torch.arange(len(answer)), torch.tensor(answer)].sum().item())
        return scores


def dialogue(
    reference: Reference, row: dict[str, Any], system: str | None, shots: Sequence[dict[str, Any]]
) -> str:
    """Write a row as a dialogue, with the text of the system and examples before it."""
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    for shot in shots:
        messages.append({"role": "user", "content": reference.asked(shot)})
        messages.append({"role": "assistant", "content": shot["label"]})
    return reference.written([*messages, {"role": "user", "content": reference.asked(row)}])


def after_prompt(reference: Reference, row: dict[str, Any], position: str, segment: Path) -> str:
    """Write what follows the adapter's virtual tokens, which include text of the template."""
    messages: Messages = [{"role": "user", "content": reference.asked(row)}]
    if position == "front":
        return reference.written(messages)
    if position == "system":
        messages.insert(0, {"role": "system", "content": MARK})
    else:
        messages[0]["content"] = MARK + messages[0]["content"]
    rest = reference.written(messages).partition(MARK)[2]
    after = json.loads(segment.read_text())["after"] if segment.is_file() else []
    fixed: str = reference.tokenizer.decode(after)
    assert rest.startswith(fixed), "the adapter has the text that follows the virtual tokens"
    return rest[len(fixed) :]


def lines(path: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def row_at(place: str) -> dict[str, Any]:
    """Read the row at ``FILE:LINE``."""
    path, _, number = place.rpartition(":")
    row: dict[str, Any] = json.loads(Path(path).read_text().splitlines()[int(number) - 1])
    return row


def compare(config: RunConfig, run_dir: Path, count: int) -> Iterator[str]:
    """Yield a table row for every arm of the evaluation."""
    prompts = {prompt.name: prompt for prompt in config.prompts}
    for task in config.tasks:
        plain = Reference(config, task)
        texts = {f"hand_written-{i}": text for i, text in enumerate(task.hand_written, 1)}
        for file in sorted((run_dir / "predictions/evaluation" / task.name).glob("*.jsonl")):
            arm, records = file.stem, lines(file, count)
            adapter = run_dir / "prompts" / arm
            reference = Reference(config, task, adapter) if arm in prompts else plain
            largest, same = 0.0, 0
            for record in records:
                row = row_at(record["place"])
                if arm in prompts:
                    position = prompts[arm].position
                    text = after_prompt(reference, row, position, adapter / "segment.json")
                else:
                    shots = [row_at(place) for place in record.get("examples", ())]
                    text = dialogue(reference, row, texts.get(arm, task.system), shots)
                wanted = reference.scores(text)
                ours = [record["scores"][choice] for choice in task.choices or ()]
                differences = [abs(a - b) for a, b in zip(ours, wanted, strict=True)]
                largest = max(largest, *differences)
                same += ours.index(max(ours)) == wanted.index(max(wanted))
            what = arm
            if arm in prompts:
                what = f"{prompts[arm].method}, position {prompts[arm].position}"
            yield f"| {task.name} | {what} | {largest:.1e} | {same} of {len(records)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--rows", type=int, default=8, help="rows of each arm")
    given = parser.parse_args()
    configs = [load_output(folder) for folder in given.run_dirs]
    if any(config.base.quantization != "none" for config in configs):
        parser.error("needs runs with base.quantization: none")
    table = [
        "# Scores beside transformers and PEFT",
        "",
        "`python -m benchmarks.agreement RUN_DIR`: the largest difference between the",
        "log-likelihoods that `promptshard evaluate` gives to the choices of a row, from packed",
        "batches, and those of transformers and PEFT, one text after the other, in fp32. "
        f"{given.rows} rows of each arm.",
        "",
        "| task | arm | largest difference | same prediction |",
        "|---|---|---|---|",
    ]
    for config, folder in zip(configs, given.run_dirs, strict=True):
        for line in compare(config, folder, given.rows):
            print(line, flush=True)
            table.append(line)
    RESULTS.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
