"""Screening: starts are judged by the rows of the first update, as the loop will."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from trainer.config import RunConfig, load
from trainer.data.task_data import load_tasks
from trainer.distributed.prefetch import prepare_batch
from trainer.evaluation.evaluator import Evaluator
from trainer.model.checkpoint_files import open_base
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_row import PackedRow
from trainer.prompts.init_search import SearchResult, Unsearched
from trainer.prompts.soft_prompt import VirtualTokens, prompt_lengths
from trainer.runtime.console import Console
from trainer.training.init_scoring import LossInitScorer
from trainer.training.step import batch_objective

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = ["prompts.triage.seed=3", "training.tokens_per_step=200", "base.quantization=none"]


def quickstart() -> RunConfig:
    return load(ROOT / "examples" / "quickstart.yaml", OVERRIDES)


def test_losses_are_those_of_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    config = quickstart()
    files = open_base(config.base)
    tasks = load_tasks(config, files.tokenizer, 512, files.config.vocab_size, splits=["train"])
    base, output = load_unsharded(ROOT / "examples" / "tiny_base", "none"), io.StringIO()
    # So short that the rows of one start are in several packed batches.
    evaluator = Evaluator(OneRank(), base, files.tokenizer, TokenBudget(150))  # type: ignore[arg-type]
    screening = LossInitScorer(config, tasks, evaluator, Console(output, output))
    texts = ("an illness?", "medicine?", "test?", "broken")
    starts = [tuple(files.tokenizer(text)["input_ids"]) for text in texts]
    looked_up = []

    def embed(ids: Sequence[int]) -> torch.Tensor:
        looked_up.append(tuple(ids))
        embedded_nH = base(torch.tensor(ids), []).embeddings_TH.detach()
        # Words of the last start are not finite, wherever they stand among others.
        broken = [ids[n : n + len(starts[-1])] == list(starts[-1]) for n in range(len(ids))]
        embedded_nH[[n for n, losses in enumerate(broken) if losses]] = torch.nan
        return embedded_nH

    asked = [(i, words) for words in starts for i in (1, 0)]  # of both prompts, in any order
    totals, done = [], []

    @contextmanager
    def working(what: str, total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield done.append

    monkeypatch.setattr(screening._console, "working", working)
    with screening.working({0: 4, 1: 4}):
        losses = screening.losses(asked, embed)
    assert totals == [sum(done)], "the bar ends where all rows are read"
    assert sum(done) == 4 * len(BatchSource(config, tasks).next_step([True, True]))
    assert [word for ids in looked_up for word in ids] == [w for _, words in asked for w in words]
    assert len(looked_up) == len(asked), "a portion has no more starts than fit into a packed batch"
    expected = []
    for i, words in asked[:-2]:
        on = [n == i for n in range(2)]
        rows = [packed_row.example for packed_row in BatchSource(config, tasks).next_step(on)]
        packed_rows = [PackedRow(row, 0, slot) for slot, row in enumerate(rows)]
        start = VirtualTokens(base(torch.tensor(words), []).embeddings_TH.detach())
        batch = prepare_batch(packed_rows, prompt_lengths([start]), OneRank().device)
        with torch.no_grad():
            loss, _ = batch_objective(base, batch, [start], [sum(r.num_labels for r in rows)])
        expected.append(float(loss))
    assert len(set(expected)) == 6
    assert losses[:-2] == pytest.approx(expected, rel=1e-4)
    assert losses[-2:] == [math.inf] * 2

    evaluator = Evaluator(OneRank(), base, files.tokenizer, TokenBudget(1200))  # type: ignore[arg-type]
    wider = LossInitScorer(config, tasks, evaluator, Console(output, output))
    looked_up.clear()
    assert wider.losses(asked, embed)[:-2] == pytest.approx(expected, rel=1e-4)
    assert 1 < len(looked_up) < len(asked), "several starts in a packed batch"

    screening.say(
        0, SearchResult((1, 2), "drawing 3 of words", 0.25, 0.25, 1.5, 64, 6), "an illness?"
    )
    screening.say(1, Unsearched((1, 2), "the task's choices", "6 are too few"), "plants meat")
    screening.say(1, SearchResult((1, 2), "one of two", 0.25, 0.25, 1.5, 2, 0), "a text")
    screening.say(1, Unsearched((1, 2), "the only text", ""), "plants meat")
    cost, *words = output.getvalue().splitlines()
    rows = sum(done)
    assert cost == (
        f"init: auto compares initial prompts: 8 candidates on {rows:,} rows, 3% of the "
        "training FLOPs of 2 prompt(s)"
    )
    assert words[0].startswith("triage: starts from drawing 3 of words, the best of 64 candidates")
    assert (
        "loss 0.2500; before the genetic search: best 0.2500, median 1.5000): 'an illness?'"
        in words[0]
    )
    assert words[1:] == [
        "animals: starts from the task's choices: 'plants meat' (6 are too few)",
        "animals: starts from one of two, the best of 2 candidates on its first rows (loss "
        "0.2500): 'a text'",
        "animals: starts from the only text: 'plants meat'",
    ]
