"""Build the packed batches of the next step in a thread while the device computes this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from trainer.model.attention.interface import batch_layout
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_batch import (
    PackedBatch,
    build_packed_batch,
    build_teacher_batch,
    map_tensors,
)
from trainer.packing.packed_row import PackedRow, PromptLengths
from trainer.packing.planning import plan_batches

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class StepBatch:
    """The input of one optimizer step.

    Attributes:
        rows: of all ranks.
        plan: this rank's rows, by micro-batch.
        batches: this rank's packed batches, in host memory.
    """

    rows: list[PackedRow]
    plan: list[list[PackedRow]]
    batches: list[PackedBatch]


@dataclass(frozen=True)
class RankInfo:
    """The rank for which batches are built, and its device."""

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
    """Build a packed batch and its attention layout in host memory, page-locked for a GPU.

    Args:
        distilled: also build the teacher's packed batch, which all micro-batches of a step have if
            any row has a teacher, because all ranks take part in the teacher's forward pass.
    """
    batch = _with_layout(build_packed_batch(rows, prompt_lengths.tokens, prompt_lengths.past))
    if distilled:
        batch = replace(batch, teacher=_with_layout(build_teacher_batch(rows)))
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # the current device of a new thread is cuda:0
        return map_tensors(batch, torch.Tensor.pin_memory)


def _with_layout(batch: PackedBatch) -> PackedBatch:
    return replace(batch, layout=batch_layout(batch, torch.device("cpu")))


def prepare_step(
    rows: list[PackedRow], prompt_lengths: PromptLengths, rank: RankInfo, max_tokens: int
) -> StepBatch:
    """Distribute a step's rows over ranks and micro-batches, and build this rank's batches."""
    plan = plan_batches(rows, prompt_lengths.tokens, rank.world_size, max_tokens)[rank.rank]
    distilled = any(row.teacher is not None for row in rows)
    batches = [
        prepare_batch(mine, prompt_lengths, rank.device, distilled=distilled) for mine in plan
    ]
    return StepBatch(rows, plan, batches)


class StepPrefetcher:
    """Iterates over the steps of a batch source; a thread builds the next step during this one.

    Rows and their order equal those of the source. ``state_dict`` excludes the prefetched step. A
    step that was prefetched for other arguments is built again.
    """

    def __init__(self, source: BatchSource, rank: RankInfo) -> None:
        self._source, self._rank = source, rank
        self._state = source.state_dict()
        self._prefetched: tuple[Any, Future[tuple[StepBatch, Any]]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def next_step(
        self, active: Sequence[bool], prompt_lengths: PromptLengths, max_tokens: int
    ) -> StepBatch:
        """Return the next step of all active prompts. Raises what the thread raised."""
        arguments = (tuple(active), prompt_lengths, max_tokens)
        built = None
        if self._prefetched is not None:
            prefetched_for, future = self._prefetched
            built = future.result()
            if prefetched_for != arguments:  # a prompt has stopped, or the budget has changed
                self._source.load_state_dict(self._state)
                built = None
        batch, self._state = built or self._build(*arguments)
        self._prefetched = (arguments, self._thread.submit(self._build, *arguments))
        return batch

    def _build(
        self, active: Sequence[bool], prompt_lengths: PromptLengths, max_tokens: int
    ) -> tuple[StepBatch, Any]:
        rows = self._source.next_step(active)
        batch = prepare_step(rows, prompt_lengths, self._rank, max_tokens)
        return batch, self._source.state_dict()

    def state_dict(self) -> list[dict[str, Any]]:
        return self._state

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        if self._prefetched is not None:
            self._prefetched[1].result()
            self._prefetched = None
        self._source.load_state_dict(state)
        self._state = self._source.state_dict()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def prefetched(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield ``make(item)`` for each item in order; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        pending: Future[R] | None = None
        for item in items:
            done, pending = pending, thread.submit(make, item)
            if done is not None:
                yield done.result()
        if pending is not None:
            yield pending.result()
