"""Ranks that are threads: what all have sent is exchanged where they meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Post:
    """Where the ranks meet.

    Attributes:
        calls: names of the collectives that were made.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.calls: list[str] = []
        self._parts: list[Any] = [None] * ranks
        self._meeting = threading.Barrier(ranks, timeout=20)

    def exchange(self, rank: int, part: Any, name: str) -> list[Any]:
        """Every rank's part; all ranks call it, for the same collective."""
        self._parts[rank] = (name, part)
        self._meeting.wait()
        if rank == 0:
            self.calls.append(name)
        sent = list(self._parts)
        self._meeting.wait()
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
    """What each rank's work gives, and where they met."""
    post = Post(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        futures = [threads.submit(work, Thread(post, rank)) for rank in range(ranks)]
        return [one.result() for one in futures], post
