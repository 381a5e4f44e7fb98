"""PEFT's arms: plain PEFT and torch, on the same rows in the same order as this trainer's.

    python -m benchmarks.learning.peers RUN.yaml JOBS.json OUT.jsonl

One process trains one job after the other and writes a line for each.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.config import RunConfig, load
from trainer.data.prompt_positions import with_positions
from trainer.data.task_data import EvalSet, TaskData, load_tasks
from trainer.data.token_table import Example
from trainer.evaluation import metrics
from trainer.packing.batch_source import BatchSource

LORA_RANK = 8


@dataclass(frozen=True)
class PeerMethod:
    """A method of PEFT, and the settings of its config besides the number of virtual tokens."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


FROM_VOCABULARY = PeerMethod("prompt_tuning", {"prompt_tuning_init": "SAMPLE_VOCAB"})
FROM_TEXT = PeerMethod("prompt_tuning", {"prompt_tuning_init": "TEXT"})
P_TUNING = PeerMethod("p_tuning")
PREFIX_TUNING = PeerMethod("prefix_tuning")
IA3 = PeerMethod("ia3")
LORA = PeerMethod(
    "lora", {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "target_modules": "all-linear"}
)
ARMS = {
    "prompt tuning, vocab": FROM_VOCABULARY,
    "prompt tuning, text": FROM_TEXT,
    "p-tuning": P_TUNING,
    "LoRA": LORA,
}
#: Batch size of scoring, in rows.
EVALUATED = 128


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        text: initial text, for an arm with the init TEXT.
        evaluate: steps after which the model is scored.
    """

    arm: str
    task: str
    rate: float
    seed: int
    text: str
    evaluate: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.task}/{self.rate:g}/{self.seed}"


class Data:
    """Tokenized rows of a run file, read by the trainer's code."""

    def __init__(self, config: RunConfig) -> None:
        from trainer.model.checkpoint_files import open_base

        files = open_base(config.base)
        config = with_positions(config, files.tokenizer)
        self.config, self.tokenizer, self.folder = config, files.tokenizer, config.base.model
        self.tasks: dict[str, TaskData] = load_tasks(
            config, files.tokenizer, files.context_length, files.config.vocab_size
        )

    def updates(self, task: str, seed: int) -> Iterator[list[Example]]:
        """Yield endlessly the rows of each update, as in this trainer's run with the same seed."""
        same = (p for p in self.config.prompts if (p.task, p.seed) == (task, seed))
        alone = self.config.model_copy(update={"prompts": [next(same)]})
        feed = BatchSource(alone, self.tasks)
        while True:
            yield [packed_row.example for packed_row in feed.next_step([True])]


def plain_base(folder: str) -> Any:
    """Load a base model with transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def peft_model(
    base: Any, method: PeerMethod, *, seed: int, text: str, num_virtual_tokens: int
) -> Any:
    """Return a PEFT model over a copy of the base, with initial weights from the seed.

    Args:
        text: initial text, for prompt tuning with the init TEXT.
    """
    from peft import (
        IA3Config,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
    )

    torch.manual_seed(seed)
    settings = dict(method.settings, task_type="CAUSAL_LM")
    if method.name in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        settings["num_virtual_tokens"] = num_virtual_tokens
    if method == FROM_TEXT:
        settings["prompt_tuning_init_text"] = text
        settings["tokenizer_name_or_path"] = base.config.name_or_path
    if method.name == "p_tuning":
        settings["encoder_hidden_size"] = base.config.hidden_size
    configs: dict[str, Any] = {
        "ia3": IA3Config,
        "lora": LoraConfig,
        "p_tuning": PromptEncoderConfig,
        "prefix_tuning": PrefixTuningConfig,
        "prompt_tuning": PromptTuningConfig,
    }
    return get_peft_model(copy.deepcopy(base), configs[method.name](**settings))


def padded(rows: Sequence[Example]) -> dict[str, Tensor]:
    """Pad rows on the right to [B, T]; positions without a label have -100."""
    longest = max(row.num_tokens for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for i, row in enumerate(rows):
        own = slice(row.target_start, row.num_tokens)
        ids_BT[i, : row.num_tokens] = torch.tensor(row.input_ids)
        mask_BT[i, : row.num_tokens] = 1
        labels_BT[i, own] = ids_BT[i, own]
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def row_losses(model: Any, rows: Sequence[Example]) -> Tensor:
    """Summed negative log-likelihood of each row's labels, [B]."""
    batch = padded(rows)
    labels_BT = batch.pop("labels")
    length = labels_BT.shape[1]
    logits_BTV = model(**batch).logits[:, -length:]  # without virtual tokens
    losses = cross_entropy(logits_BTV[:, :-1].transpose(1, 2), labels_BT[:, 1:], reduction="none")
    return losses.sum(1)


def mean_loss(model: Any, rows: Sequence[Example]) -> Tensor:
    """Training loss: mean over the labels of all rows."""
    return row_losses(model, rows).sum() / sum(row.num_labels for row in rows)


@torch.no_grad()
def score(model: Any, data: Data, rows: EvalSet) -> dict[str, float]:
    """Compute ``loss`` and the task's metric as in ``trainer.evaluation.evaluator``."""
    width, task = rows.candidates.width, rows.task
    flat = [example for candidates in rows.candidates for example in candidates]
    # Sorted by length, so that batches have little padding.
    order = sorted(range(len(flat)), key=lambda i: flat[i].num_tokens)
    nll = torch.zeros(len(flat), dtype=torch.float64)
    with judged(model):
        for start in range(0, len(flat), EVALUATED):
            part = order[start : start + EVALUATED]
            nll[part] = row_losses(model, [flat[i] for i in part]).double()
        nll_RC, gold = nll.view(-1, width), torch.tensor(rows.gold)
        right_R = nll_RC.gather(1, gold[:, None])[:, 0]
        scores = {"loss": float(right_R.sum() / sum(rows.label_counts))}
        if task.metric == "accuracy":
            scores["accuracy"] = metrics.accuracy(nll_RC.argmin(1).tolist(), rows.gold)
        else:
            assert task.metric == "execution", f"no example task has the metric {task.metric}"
            texts = _continued(model, data.tokenizer, flat, task.max_new_tokens)
            values = [rows.rows[example.row][task.tests] for example in flat]
            passed = metrics.execution(texts, values)
            scores["execution"] = sum(passed) / len(passed)
    return scores


def _continued(
    model: Any, tokenizer: Any, rows: Sequence[Example], max_new_tokens: int
) -> list[str]:
    """Generate greedily after each input, until EOS.

    Each batch has inputs of one length, because PEFT counts padding on the left as positions.
    """
    texts = [""] * len(rows)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(row.target_start, []).append(i)
    for length, part in by_length.items():
        ids_BT = torch.tensor([rows[i].input_ids[:length] for i in part])
        written = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        for i, text in zip(part, new, strict=True):
            texts[i] = text
    return texts


@contextmanager
def judged(model: Any) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def train(data: Data, base: Any, job: Job, steps: int, num_virtual_tokens: int) -> dict[str, Any]:
    """Train one job: AdamW, clipping to 1, linear decay, the defaults of transformers' Trainer.

    Returns:
        The job's fields, ``losses``, and ``scores``: step -> scores on the validation rows.
    """
    from transformers import get_linear_schedule_with_warmup

    model = peft_model(
        base,
        ARMS[job.arm],
        seed=job.seed,
        text=job.text,
        num_virtual_tokens=num_virtual_tokens,
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    validation = data.tasks[job.task].evaluation["validation"]
    scores: dict[str, dict[str, float]] = {}
    losses = []
    for step, rows in zip(range(1, steps + 1), data.updates(job.task, job.seed), strict=False):
        loss = mean_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step in job.evaluate:
            scores[str(step)] = score(model, data, validation)
    return asdict(job) | {"scores": scores, "losses": losses}


def main() -> None:
    run_file, jobs, out = sys.argv[1:]
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = load(run_file)
    data, base = Data(config), plain_base(config.base.model)
    (length,) = {prompt.num_virtual_tokens for prompt in config.prompts}
    with Path(out).open("w") as lines:
        for values in json.loads(Path(jobs).read_text()):
            job = Job(**values | {"evaluate": tuple(values["evaluate"])})
            result = train(data, base, job, config.training.steps, length)
            lines.write(json.dumps(result) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
