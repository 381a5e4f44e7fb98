"""Ranks as threads of one process, which exchange values through shared memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tests.one_rank import OneRank
from trainer.runtime.errors import BadInput

T = TypeVar("T")


class Post:
    """Exchanges the values of all ranks in each collective.

    Attributes:
        calls: names of the collectives so far.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.calls: list[str] = []
        self._parts: list[Any] = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=20)

    def exchange(self, rank: int, part: Any, name: str) -> list[Any]:
        """Return every rank's part. All ranks must call it for the same collective."""
        self._parts[rank] = (name, part)
        self._barrier.wait()
        if rank == 0:
            self.calls.append(name)
        sent = list(self._parts)
        self._barrier.wait()
        assert {kind for kind, _ in sent} == {name}
        return [part for _, part in sent]


class Thread:
    """One rank's ``RowExchange``."""

    def __init__(self, post: Post, rank: int) -> None:
        self.post, self.rank, self.ranks = post, rank, post.ranks

    def swap(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        every = self.post.exchange(self.rank, rows.split(list(sent)), "swap")
        own = [parts[self.rank] for parts in every]
        assert [len(part) for part in own] == list(received)
        return torch.cat(own)

    def gather(self, rows: Tensor) -> Tensor:
        every = self.post.exchange(self.rank, rows, "gather")
        assert len({part.shape for part in every}) == 1
        return torch.cat(every)

    def scatter_sum(self, rows: Tensor) -> Tensor:
        every = self.post.exchange(self.rank, rows, "scatter_sum")
        return torch.stack(every).sum(0).chunk(self.ranks)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self.post.exchange(self.rank, values, "sum")).sum(0)

    def maximum(self, values: Tensor) -> Tensor:
        return torch.stack(self.post.exchange(self.rank, values, "maximum")).amax(0)


def on_all_ranks(ranks: int, work: Callable[[Thread], T]) -> tuple[list[T], Post]:
    """Run ``work`` on every rank; return its results by rank, and the exchange they used."""
    post = Post(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        futures = [threads.submit(work, Thread(post, rank)) for rank in range(ranks)]
        return [one.result() for one in futures], post


class ThreadRank(OneRank):
    """One rank of several: a ``OneRank`` whose collectives reach the other threads."""

    def __init__(self, post: Post, rank: int, local_rank: int) -> None:
        super().__init__(rank=rank, world_size=post.ranks, local_rank=local_rank)
        self._post = post

    def all_gather(self, value: T) -> list[T]:
        return self._post.exchange(self.rank, value, "all_gather")

    def any_rank(self, flag: bool) -> bool:
        return any(self.all_gather(flag))

    def broadcast(self, value: T | None) -> T:
        return self.all_gather(value)[0]  # type: ignore[return-value]


def on_thread_ranks(local_ranks: Sequence[int], program: Callable[[ThreadRank], Any]) -> list[Any]:
    """Run a program on every rank; return what each returned, or the problems of its BadInput."""
    post = Post(len(local_ranks))

    def run(rank: int) -> Any:
        try:
            return program(ThreadRank(post, rank, local_ranks[rank]))
        except BadInput as error:
            return error.problems

    with ThreadPoolExecutor(post.ranks) as threads:
        return list(threads.map(run, range(post.ranks)))
