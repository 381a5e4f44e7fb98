"""Cost of scoring choices: a row is read once for all its choices.

    python -m benchmarks.scoring [RUN.yaml]

Scores rows of 60 tokens after a prompt of 20 virtual tokens, with a tiny base and a Llama of 110M
parameters: 8 short choices against a single choice, and against one text per choice. Counts matrix
products on fake tensors, which do not depend on the machine, and measures CPU seconds of the Llama.
Writes a table to benchmarks/results/scoring.md. With a run file, also counts the FLOPs of that
run's initialization search, baselines, validations and training.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.figures import figure, figure_rows, machine
from benchmarks.llama import LLAMA_110M, make_base
from benchmarks.peers.counters import FlopCounter
from benchmarks.unsharded_base import load_unsharded
from trainer.data.token_table import Example
from trainer.distributed.prefetch import prepare_batch
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import CPU_TOKENS
from trainer.packing.packed_batch import PackedBatch
from trainer.packing.packed_row import PackedRow
from trainer.packing.planning import plan_batches
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens, prompt_lengths

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scoring.md"
ROWS, LENGTH, CHOICES, VIRTUAL, RANKS = 48, 60, 8, 20, 2
#: Target of 8 choices, relative to one.
REACH = 1.3
#: Of the measurement of CPU seconds.
TIMED_ROWS, ROUNDS = 12, 9

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


def once(rows: Rows, prompt: int | None, shared: int = 0) -> list[PackedRow]:
    """Return packed rows that read each row once for all its candidates."""
    return [
        PackedRow(row[0], prompt, i, candidates=tuple(row), shared=shared)
        for i, row in enumerate(rows)
    ]


def for_each(rows: Rows, prompt: int | None, shared: int = 0) -> list[PackedRow]:
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


def made_up_rows(choices: int = CHOICES, tokens: int = 1, rows: int = ROWS) -> list[list[Example]]:
    """Return rows of equal length with choices of 1 or 2 tokens and EOS."""
    text = (5,) * LENGTH
    ends = [(6 + choice, 20 + choice)[:tokens] for choice in range(choices)]
    return [
        [Example.with_target((*text, *end, 1), len(text), row) for end in ends]
        for row in range(rows)
    ]


def bases() -> Iterator[tuple[str, PromptedBase]]:
    yield "tiny base (0.8M parameters)", load_unsharded(ROOT / "examples" / "tiny_base", "int8")
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), LLAMA_110M | {"dtype": "bfloat16"})
        yield "Llama (110M parameters)", load_unsharded(Path(folder), "int8")


def slowdown(base: PromptedBase, tokens: int) -> float:
    """Return the CPU seconds of 8 choices relative to one: the median of rounds in turns."""
    prompts = [VirtualTokens(torch.zeros(VIRTUAL, base.hidden_size))]
    lengths = prompt_lengths(prompts)
    one, eight = (
        prepare_batch(once(made_up_rows(n, tokens, TIMED_ROWS), 0), lengths, torch.device("cpu"))
        for n in (1, CHOICES)
    )

    def seconds(batch: PackedBatch) -> float:
        start = time.process_time()
        base(batch, prompts)
        return time.process_time() - start

    with torch.no_grad():
        base(eight, prompts)
        ratios = [seconds(eight) / seconds(one) for _ in range(ROUNDS)]
    return median(ratios)


def compare() -> list[str]:
    """Compare 8 choices with one, and with one text per choice; return Markdown."""
    figures, lines = [], []
    for name, base in bases():
        prompts = [VirtualTokens(torch.zeros(VIRTUAL, base.hidden_size))]
        for tokens in (1, 2):
            what = f"{name}, choices of {tokens} token(s)"
            rows, single = made_up_rows(tokens=tokens), made_up_rows(1, tokens)
            one, new = (count(base, once(r, 0), prompts) for r in (single, rows))
            old = count(base, for_each(rows, 0), prompts)
            figures.append(figure(f"FLOPs, {what}: 8 / 1", new.total / one.total, REACH))
            lines += [
                f"| {what} | {form} | {cost.total / 1e9:.2f} | {cost.head / cost.total:.1%} |"
                for form, cost in (
                    ("1 choice", one),
                    ("8 choices", new),
                    ("8 choices, one text per choice", old),
                )
            ]
            if not name.startswith("tiny"):
                measured = slowdown(base, tokens)
                figures.append(figure(f"CPU seconds, {what}: 8 / 1", measured, REACH))
    return [
        *figure_rows(figures),
        "",
        "| base | row is read with | GFLOP | of it the head |",
        "|---|---|---|---|",
        *lines,
    ]


def costs(path: str) -> list[str]:
    """Count the FLOPs of scoring and training in a run; return Markdown."""
    from trainer.config import load
    from trainer.data.task_data import load_tasks
    from trainer.model.checkpoint_files import open_base
    from trainer.packing.batch_source import BatchSource
    from trainer.training.validation import validation_steps

    config = load(path)
    files = open_base(config.base)
    base = load_unsharded(Path(config.base.model), "int8")
    tasks = load_tasks(config, files.tokenizer, files.context_length, files.config.vocab_size)
    prompts = [
        VirtualTokens(torch.zeros(p.num_virtual_tokens, base.hidden_size)) for p in config.prompts
    ]
    feed, steps = BatchSource(config, tasks), config.last_step
    active = [True] * len(prompts)
    updates = [feed.next_step(active) for _ in range(steps)]
    training = sum(count(base, rows, prompts, train=True).total for rows in updates)
    search = sum(
        config.init_budget(prompt)
        * count(base, [row for row in updates[0] if row.prompt == k], prompts).total
        for k, prompt in enumerate(config.prompts)
        if prompt.init.auto
    )

    def total(form: Any) -> dict[str, int]:
        baselines = validation = 0
        for name, data in tasks.items():
            sets = [data.evaluation["validation"], *data.hand_written["validation"]]
            packed_rows = [
                packed_row
                for rows in sets
                for packed_row in form(list(rows.candidates), None, rows.num_shared)
            ]
            baselines += count(base, packed_rows, []).total
            readers = [k for k, prompt in enumerate(config.prompts) if prompt.task == name]
            packed_rows = [
                packed_row
                for k in readers
                for packed_row in form(list(sets[0].candidates), k, sets[0].num_shared)
            ]
            validation += count(base, packed_rows, prompts).total
        times = len(validation_steps(config))
        return {"baselines": baselines, f"{times} validations": times * validation}

    new, old = total(once), total(for_each)
    new, old = ({"initialization search": search, **costs} for costs in (new, old))
    new["training"] = old["training"] = training
    lines = [
        f"`{path}`, {steps} steps:",
        "",
        "| | TFLOP, one text per choice | once | share of the run |",
        "|---|---|---|---|",
    ]
    for name in new:
        before, now = old[name] / 1e12, new[name] / 1e12
        lines.append(f"| {name} | {before:.3f} | {now:.3f} | {new[name] / sum(new.values()):.1%} |")
    return lines


def main() -> None:
    lines = [
        "# Cost of scoring choices",
        "",
        f"`python -m benchmarks.scoring`. Rows of {LENGTH} tokens, choices with EOS, after "
        f"{VIRTUAL} virtual tokens; FLOPs of {ROWS} rows, CPU seconds of {TIMED_ROWS} (median of "
        f"{ROUNDS} rounds in turns). {machine()}.",
        "",
        *compare(),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for path in sys.argv[1:]:
        print("\n".join(["", *costs(path)]))


if __name__ == "__main__":
    main()
