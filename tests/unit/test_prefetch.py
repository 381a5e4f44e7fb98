"""What is prepared ahead is what would have been read anyway."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.data.sampler import TokenBudgetSampler
from trainer.data.teacher import Teacher
from trainer.data.token_table import Example
from trainer.distributed.prefetch import RankInfo, StepPrefetcher, prefetched, prepare_batch
from trainer.packing.packed_batch import map_tensors
from trainer.packing.packed_row import PackedRow, PromptLengths

LENGTHS = [5, 9, 2, 7, 4, 12, 3]
EXAMPLES = [Example.with_target(tuple(range(length)), 1, i) for i, length in enumerate(LENGTHS)]
BOTH, FIRST = [True, True], [True, False]
VIRTUAL = PromptLengths((3, 2), (0, 0))


class TwoPrompts:
    """A feed of two prompts, that remembers which threads asked it."""

    def __init__(self) -> None:
        self.cursors = [TokenBudgetSampler(LENGTHS, 15, seed) for seed in (0, 1)]
        self.threads: list[str] = []
        self.fails = False

    def next_step(self, active: Any) -> list[PackedRow]:
        if self.fails:
            raise OSError("the disk is gone")
        self.threads.append(threading.current_thread().name)
        packed_rows: list[PackedRow] = []
        for k, cursor in enumerate(self.cursors):
            rows = cursor.next_rows() if active[k] else []
            packed_rows += [
                PackedRow(EXAMPLES[row], k, len(packed_rows) + i) for i, row in enumerate(rows)
            ]
        return packed_rows

    def state_dict(self) -> Any:
        return [cursor.state_dict() for cursor in self.cursors]

    def load_state_dict(self, state: Any) -> None:
        for cursor, saved in zip(self.cursors, state, strict=True):
            cursor.load_state_dict(saved)


def prefetch(feed: TwoPrompts) -> StepPrefetcher:
    return StepPrefetcher(feed, RankInfo(0, 2, torch.device("cpu")))  # type: ignore[arg-type]


def rows(step_batch: Any) -> list[tuple[int | None, int]]:
    return [(packed_row.prompt, packed_row.example.row) for packed_row in step_batch.rows]


def test_prefetched_steps_equal_the_sources_and_one_is_prepared_in_advance():
    feed, plain = TwoPrompts(), TwoPrompts()
    feed_ahead = prefetch(feed)
    for _ in range(12):
        step_batch = feed_ahead.next_step(BOTH, VIRTUAL, 20)
        assert rows(step_batch) == [(p.prompt, p.example.row) for p in plain.next_step(BOTH)]
        assert feed_ahead.state_dict() == plain.state_dict(), "of what was handed out, not prepared"
        assert len(step_batch.batches) == len(step_batch.plan)
        assert all(batch.layout is not None for batch in step_batch.batches)
    feed_ahead.close()
    assert feed.threads[0] == "MainThread"
    assert {name.split("_")[0] for name in feed.threads[1:]} == {"prefetch"}


def test_a_stopped_prompt_does_not_change_the_rows_of_others():
    feed, plain = TwoPrompts(), TwoPrompts()
    feed_ahead = prefetch(feed)
    for active, budget in [(BOTH, 20)] * 3 + [(FIRST, 20)] * 2 + [(FIRST, 12)] * 2:
        step_batch = feed_ahead.next_step(active, VIRTUAL, budget)
        assert rows(step_batch) == [(p.prompt, p.example.row) for p in plain.next_step(active)]
        assert feed_ahead.state_dict() == plain.state_dict()
    feed_ahead.close()


def test_resume_continues_from_the_last_consumed_step():
    uninterrupted = prefetch(TwoPrompts())
    for _ in range(4):
        uninterrupted.next_step(BOTH, VIRTUAL, 20)
    saved = json.loads(json.dumps(uninterrupted.state_dict()))
    expected = [rows(uninterrupted.next_step(BOTH, VIRTUAL, 20)) for _ in range(5)]
    other = prefetch(TwoPrompts())
    other.next_step(BOTH, VIRTUAL, 20)  # and one more is on its way
    other.load_state_dict(saved)
    assert other.state_dict() == saved
    assert [rows(other.next_step(BOTH, VIRTUAL, 20)) for _ in range(5)] == expected
    uninterrupted.close()
    other.close()


def test_an_error_in_the_prefetch_thread_reaches_the_consumer():
    feed = TwoPrompts()
    feed_ahead = prefetch(feed)
    feed.fails = True
    with pytest.raises(OSError, match="disk is gone"):
        feed_ahead.next_step(BOTH, VIRTUAL, 20)
    feed.fails = False
    feed_ahead.next_step(BOTH, VIRTUAL, 20)
    feed.fails = True
    feed_ahead.next_step(BOTH, VIRTUAL, 20)
    with pytest.raises(OSError, match="disk is gone"):
        feed_ahead.next_step(BOTH, VIRTUAL, 20)
    feed_ahead.close()


def test_prefetching_keeps_the_order_and_prepares_one_item_at_a_time():
    made: list[int] = []

    def make(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        made.append(item)
        return item * item

    assert list(prefetched(make, range(5))) == [0, 1, 4, 9, 16]
    assert list(prefetched(make, [])) == []
    results = prefetched(make, range(5, 9))
    assert next(results) == 25
    with pytest.raises(ValueError, match="seven"):
        list(results)
    assert 8 not in made[5:-1]
    made.clear()
    results = prefetched(make, range(100, 200))
    next(results)
    results.close()
    assert len(made) <= 3


def test_a_batch_for_a_gpu_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its tensors: those of its teacher, of its layout, and of rows with candidates, too."""
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        # As torch: a copy with the same strides, which fails if elements share memory.
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
        pinned.append(copy)
        return copy

    def check(tensor: Tensor) -> Tensor:
        assert any(tensor is one for one in pinned)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    teacher = Teacher(0, (5, 6, 7), 0)
    device = torch.device("cuda", 1)
    rows = [PackedRow(example, i % 2, i) for i, example in enumerate(EXAMPLES)]
    for packed_rows in (
        rows,
        [replace(row, teacher=teacher) for row in rows],
        [replace(row, candidates=(row.example, *EXAMPLES[4:5])) for row in rows[4:]],
    ):
        distilled = packed_rows[0].teacher is not None
        batch = prepare_batch(
            packed_rows, PromptLengths((3, 0), (0, 2)), device, distilled=distilled
        )
        assert (batch.teacher is not None) == distilled
        map_tensors(batch, check)
    assert len(pinned) > 60
