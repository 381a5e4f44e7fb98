"""Screening: the start that fits the first rows best is taken, and they are the first update's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from tests.whole_base import load_whole
from trainer.base.files import open_base
from trainer.config import RunConfig, load
from trainer.console import Console
from trainer.evaluation import Evaluator
from trainer.memory import StreamBudget
from trainer.objective import stream_objective
from trainer.prefetch import prepare_stream
from trainer.starts import Screening
from trainer.tasks.feed import Feed, load_tasks
from trainer.tasks.streams import Piece, PromptLengths

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = ["prompts.triage.seed=3", "training.tokens_per_step=200", "base.quantization=none"]


class Alone:
    """A rank of one, without deepspeed."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def all_reduce_sum(self, tensors: Any) -> None: ...

    def end_step(self) -> None: ...


def quickstart() -> RunConfig:
    return load(ROOT / "examples" / "quickstart.yaml", OVERRIDES)


def test_the_start_of_least_loss_is_taken() -> None:
    config = quickstart()
    files = open_base(config.base)
    tasks = load_tasks(config, files.tokenizer, 512, files.config.vocab_size, splits=["train"])
    base, said = load_whole(ROOT / "examples" / "tiny_base", "none"), io.StringIO()
    # So short that the rows of one start are in several streams.
    evaluator = Evaluator(Alone(), base, files.tokenizer, StreamBudget(150))  # type: ignore[arg-type]
    screening = Screening(config, tasks, evaluator, Console(said, said))
    generator = torch.Generator().manual_seed(0)
    tokens = [files.tokenizer(text)["input_ids"] for text in ("illness?", "medicine?", "test?")]
    starts = [(f"start {n}", base(torch.tensor(ids), []).detach()) for n, ids in enumerate(tokens)]
    starts.append(("noise", torch.randn(5, base.hidden_size, generator=generator)))
    starts.append(("broken", torch.full((5, base.hidden_size), torch.nan)))

    rows = [piece.example for piece in Feed(config, tasks).next_step([True, False])]
    losses = []
    for _, start in starts[:-1]:
        pieces = [Piece(row, 0, i) for i, row in enumerate(rows)]
        stream = prepare_stream(pieces, PromptLengths.of([start]), Alone.device)
        with torch.no_grad():
            loss, _ = stream_objective(base, stream, [start], [sum(r.num_labels for r in rows)])
        losses.append(float(loss))
    best = losses.index(min(losses))
    for shift in range(len(starts)):  # wherever it stands among the others
        turned = starts[shift:] + starts[:shift]
        assert torch.equal(screening.choose(0, turned), starts[best][1])
    words = f"triage: starts from {starts[best][0]}, of 5 starts the one of least loss"
    assert words in said.getvalue()
    assert f"({min(losses):.4f}; in the middle" in said.getvalue()
