"""FLOPs of scoring choices if a row is read once for all choices or once for each.

    python -m benchmarks.scoring [RUN.yaml]

Counts the matrix products of a tiny base and of a Llama of 110M parameters on rows of 60 tokens
with 3 choices after a prompt of 20 virtual tokens, and writes a table to
benchmarks/results/scoring.md. With a run file, also counts the FLOPs of that run's baselines,
validations and training. Tensors are fake, so nothing is computed and counts do not depend on the
machine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.figures import figure, figure_rows
from benchmarks.llama import LLAMA_110M, make_base
from benchmarks.peers.counters import FlopCounter
from benchmarks.unsharded_base import load_unsharded
from trainer.data.token_table import Example
from trainer.distributed.prefetch import prepare_batch
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import CPU_TOKENS
from trainer.packing.packed_batch import PackedRow
from trainer.packing.planning import plan_batches
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens, prompt_lengths

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scoring.md"
ROWS, LENGTH, CHOICES, VIRTUAL, RANKS = 48, 60, 3, 20, 2
#: Target, relative to the FLOPs of reading the row once for each of 3 choices.
REACH = 0.45

Rows = Sequence[Sequence[Example]]


class Counted:
    """Counts FLOPs of packed batches: in total, and of the base model's head."""

    def __init__(self, base: PromptedBase) -> None:
        self.base = base
        self.total = self.head = 0

    def read(
        self, packed_rows: Sequence[PackedRow], prompts: Sequence[SoftPrompt], train: bool = False
    ) -> None:
        """Count one packed batch, with a backward pass if ``train``."""
        lengths = prompt_lengths(prompts)
        batch = prepare_batch(packed_rows, lengths, torch.device("cpu"))
        head = self.base.model.get_output_embeddings()
        counter, before = FlopCounter(), [0]
        hooks = [
            head.register_forward_pre_hook(lambda *_: before.append(counter.total)),
            head.register_forward_hook(lambda *_: before.append(counter.total)),
        ]
        with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.set_grad_enabled(train):
            leaves = [torch.empty_like(p.tensor, requires_grad=train) for p in prompts]
            result = self.base(
                batch, [type(p)(leaf) for p, leaf in zip(prompts, leaves, strict=True)]
            )
            if train:
                torch.autograd.grad(result.losses.loss_N.sum(), leaves)
        for hook in hooks:
            hook.remove()
        self.total += counter.total
        self.head += before[2] - before[1]


def once(rows: Rows, prompt: int | None) -> list[PackedRow]:
    """Return packed rows that read each row once for all its candidates."""
    return [PackedRow(row[0], prompt, i, candidates=tuple(row)) for i, row in enumerate(rows)]


def for_each(rows: Rows, prompt: int | None) -> list[PackedRow]:
    """Return packed rows that read each row once for each of its candidates."""
    return [PackedRow(example, prompt, i) for i, row in enumerate(rows) for example in row]


def count(
    base: PromptedBase,
    packed_rows: Sequence[PackedRow],
    prompts: Sequence[SoftPrompt],
    train: bool = False,
) -> Counted:
    """Count FLOPs of all packed batches of all ranks."""
    counted = Counted(base)
    lengths = prompt_lengths(prompts).tokens
    for rank in plan_batches(packed_rows, lengths, RANKS, CPU_TOKENS):
        for batch in rank:
            counted.read(batch, prompts, train)
    return counted


def made_up_rows() -> list[list[Example]]:
    """Return rows of equal length with choices of one token and EOS."""
    text = (5,) * (LENGTH - 2)
    return [
        [Example.with_target((*text, 6 + choice, 1), len(text), row) for choice in range(CHOICES)]
        for row in range(ROWS)
    ]


def bases() -> Iterator[tuple[str, PromptedBase]]:
    yield "tiny base (0.8M parameters)", load_unsharded(ROOT / "examples" / "tiny_base", "int8")
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), LLAMA_110M | {"dtype": "bfloat16"})
        yield "Llama (110M parameters)", load_unsharded(Path(folder), "int8")


def compare() -> list[str]:
    """Compare the two forms on synthetic rows; return Markdown."""
    figures, lines = [], []
    for name, base in bases():
        prompts = [VirtualTokens(torch.zeros(VIRTUAL, base.hidden_size))]
        new, old = (count(base, form(made_up_rows(), 0), prompts) for form in (once, for_each))
        figures.append(figure(f"{name}: once / for each choice", new.total / old.total, REACH))
        lines += [
            f"| {name} | {form} | {cost.total / 1e9:.2f} | {cost.head / cost.total:.1%} |"
            for form, cost in (("for each choice", old), ("once", new))
        ]
    return [
        *figure_rows(figures),
        "",
        "| base | row is read | GFLOP | of it the head |",
        "|---|---|---|---|",
        *lines,
    ]


def costs(path: str) -> list[str]:
    """Count the FLOPs of scoring and training in a run; return Markdown."""
    from trainer.config import load
    from trainer.data.task_data import load_tasks
    from trainer.model.checkpoint_files import open_base
    from trainer.packing.batch_source import BatchSource

    config = load(path)
    files = open_base(config.base)
    base = load_unsharded(Path(config.base.model), "int8")
    tasks = load_tasks(config, files.tokenizer, files.context_length, files.config.vocab_size)
    prompts = [
        VirtualTokens(torch.zeros(p.num_virtual_tokens, base.hidden_size)) for p in config.prompts
    ]
    feed, steps = BatchSource(config, tasks), config.last_step
    active = [True] * len(prompts)
    trained = [count(base, feed.next_step(active), prompts, train=True) for _ in range(steps)]
    training = sum(one.total for one in trained)

    def total(form: Any) -> dict[str, int]:
        baselines = validation = 0
        for name, data in tasks.items():
            sets = [data.evaluation["validation"], *data.hand_written["validation"]]
            packed_rows = [
                packed_row for rows in sets for packed_row in form(list(rows.candidates), None)
            ]
            baselines += count(base, packed_rows, []).total
            readers = [k for k, prompt in enumerate(config.prompts) if prompt.task == name]
            packed_rows = [
                packed_row for k in readers for packed_row in form(list(sets[0].candidates), k)
            ]
            validation += count(base, packed_rows, prompts).total
        times = steps // config.evaluation.every
        return {"baselines": baselines, f"{times} validations": times * validation}

    new, old = total(once), total(for_each)
    lines = [
        f"training, {steps} steps: {training / 1e12:.4f} TFLOP",
        "",
        "| TFLOP | row read for each choice | once | once / training |",
        "|---|---|---|---|",
    ]
    for name in new:
        before, now = old[name] / 1e12, new[name] / 1e12
        lines.append(f"| {name} | {before:.4f} | {now:.4f} | {new[name] / training:.2f} |")
    return lines


def main() -> None:
    lines = [
        "# Scoring choices: FLOPs",
        "",
        f"`python -m benchmarks.scoring`. {ROWS} rows of {LENGTH} tokens, {CHOICES} choices of one "
        f"token and EOS, behind {VIRTUAL} virtual tokens.",
        "",
        *compare(),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for path in sys.argv[1:]:
        print("\n".join(["", *costs(path)]))


if __name__ == "__main__":
    main()
