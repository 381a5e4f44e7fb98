"""What the device reads next is prepared while it works, one step or packed batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from trainer.model.attention.interface import make_layout
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_batch import (
    PackedBatch,
    PackedRow,
    PromptLengths,
    build_packed_batch,
    build_teacher_batch,
    changed,
)
from trainer.packing.planning import plan_batches

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class StepBatch:
    """What one step reads.

    Attributes:
        packed rows: rows of all ranks.
        plan: those of this rank, by packed batch.
        packed batches: this rank's packed batches, on the host.
    """

    rows: list[PackedRow]
    plan: list[list[PackedRow]]
    batches: list[PackedBatch]


@dataclass(frozen=True)
class RankPlace:
    """Whose packed batches are prepared."""

    rank: int
    world_size: int
    device: torch.device


def prepare_batch(
    rows: Sequence[PackedRow],
    prompt_lengths: PromptLengths,
    device: torch.device,
    *,
    distilled: bool = False,
) -> PackedBatch:
    """A packed batch with its layout, on the host; pinned where a GPU will read it.

    Args:
        taught: with its teacher's packed batch, as all packed batches of a step have of which one
            has a teacher.
    """
    batch = _laid_out(build_packed_batch(rows, prompt_lengths.tokens, prompt_lengths.past))
    if distilled:
        batch = replace(batch, teacher=_laid_out(build_teacher_batch(rows)))
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # a new thread stands on the first device, which is another's
        return changed(batch, torch.Tensor.pin_memory)


def _laid_out(batch: PackedBatch) -> PackedBatch:
    return replace(batch, layout=make_layout(batch.segments, torch.device("cpu")))


def is_distilled(rows: Sequence[PackedRow]) -> bool:
    """Whether any row of any rank has a teacher: all ranks then read one with every batch."""
    return any(row.teacher is not None for row in rows)


def prepare(
    rows: list[PackedRow], prompt_lengths: PromptLengths, rank: RankPlace, max_tokens: int
) -> StepBatch:
    """Plan a step and build this rank's packed batches."""
    plan = plan_batches(rows, prompt_lengths.tokens, rank.world_size, max_tokens)[rank.rank]
    distilled = is_distilled(rows)
    batches = [
        prepare_batch(mine, prompt_lengths, rank.device, distilled=distilled) for mine in plan
    ]
    return StepBatch(rows, plan, batches)


class Prefetch:
    """Hands out the steps of a feed, each made by a thread during the step before.

    The rows and their order are those of the feed. The state is that after the steps which were
    handed out: what is prepared ahead is made again from there if it is not what is wanted, or
    after a resume.

    Raises, from ``take``: what went wrong in the thread.
    """

    def __init__(self, feed: BatchSource, rank: RankPlace) -> None:
        self._feed, self._rank = feed, rank
        self._handed_out = feed.state_dict()
        self._ahead: tuple[Any, Future[tuple[StepBatch, Any]]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def take(
        self, active: Sequence[bool], prompt_lengths: PromptLengths, max_tokens: int
    ) -> StepBatch:
        """The next step of all active prompts."""
        wanted = (tuple(active), prompt_lengths, max_tokens)
        made = None
        if self._ahead is not None:
            prepared_for, future = self._ahead
            made = future.result()
            if prepared_for != wanted:  # a prompt has stopped, or the budget has changed
                self._feed.load_state_dict(self._handed_out)
                made = None
        step_batch, self._handed_out = made or self._make(*wanted)
        self._ahead = (wanted, self._thread.submit(self._make, *wanted))
        return step_batch

    def _make(
        self, active: Sequence[bool], prompt_lengths: PromptLengths, max_tokens: int
    ) -> tuple[StepBatch, Any]:
        rows = self._feed.next_step(active)
        return prepare(rows, prompt_lengths, self._rank, max_tokens), self._feed.state_dict()

    def state_dict(self) -> list[dict[str, Any]]:
        return self._handed_out

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        if self._ahead is not None:
            self._ahead[1].result()
            self._ahead = None
        self._feed.load_state_dict(state)
        self._handed_out = self._feed.state_dict()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def ahead(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``make(item)`` of every item, in order, the next by a thread while one is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        under_way: Future[R] | None = None
        for item in items:
            done, under_way = under_way, thread.submit(make, item)
            if done is not None:
                yield done.result()
        if under_way is not None:
            yield under_way.result()
