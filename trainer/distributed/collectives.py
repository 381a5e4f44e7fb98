"""What ranks say to each other: sums, questions, values, and slow work that the others wait for.

Uses only torch.distributed. Each collective records itself in a ``CollectiveTracker``, so that
the watchdog can say which one waits for whom.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.watchdog import CollectiveTracker, Watchdog, end_process
from trainer.runtime.errors import BadInput

T = TypeVar("T")

#: How often ranks that wait for slow work hear from each other.
TURN_SECONDS = 1.0
#: Of ``timeout_seconds``: the watchdog speaks before a collective gives up, which names no rank.
WATCHED_SHARE = 0.9


class Ranks:
    """This rank among the others, once torch.distributed is up.

    Attributes:
        pulse: which collective this rank is at.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        device: torch.device,
        timeout_seconds: int,
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = device
        self.pulse = CollectiveTracker()
        self._timeout = timeout_seconds
        self._watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start_watchdog(self, logs: Path, silence_seconds: float) -> None:
        """From now on a rank that hangs is named in ``logs``, and ends all; see the watchdog.

        Args:
            silence_seconds: how long a rank may not respond.
        """
        if self.world_size == 1:
            return
        # A connection of its own: one that is stuck must not hold up the main thread's.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=self._timeout),
            wait_for_workers=False,
        )
        self._watchdog = Watchdog(
            self.pulse,
            store,
            self.rank,
            self.world_size,
            socket.gethostname(),
            silence_seconds=silence_seconds,
            timeout_seconds=WATCHED_SHARE * self._timeout,
            give_up=partial(end_process, logs),
        )
        self.any_rank(False)  # all have a beat now
        self._watchdog.start()

    def training_step(self, step: int) -> AbstractContextManager[None]:
        """A step of the loop, which takes about as long as the ones before."""
        return self.pulse.training_step(step)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place, in one collective."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self.pulse.within("the sum of gradients"):
            dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        value = torch.tensor([int(flag)], device=self.device)
        with self.pulse.within("a question to all ranks"):
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
            return bool(value.item())

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. For small plain data."""
        values: list[Any] = [None] * self.world_size
        with self.pulse.within("an exchange of values"):
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank. For small plain data and small CPU tensors."""
        values: list[Any] = [value]
        with self.pulse.within("a word from rank 0"):
            dist.broadcast_object_list(values, 0)
        result: T = values[0]
        return result

    def run_on_all(self, check: Callable[[], T]) -> T:
        """Run a check on every rank; where any finds bad input, all raise it, in the same words."""
        result: T | None = None
        problems: list[str] = []
        try:
            result = check()
        except BadInput as error:
            problems = error.problems
        found = next((p for p in self.all_gather(problems) if p), None)
        if found is not None:
            raise BadInput(found)
        return result  # type: ignore[return-value]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank. For small plain data and small CPU tensors.

        Raises:
            BadInput: rank 0's, on all ranks.
        """
        return self.broadcast(self.run_on_all(lambda: work() if self.is_main else None))

    def run_on_each_node(self, work: Callable[[], T]) -> T | None:
        """Run slow work on one rank of every node while the others wait, however long it takes.

        Returns:
            What the work gave on the first rank of a node, None on the others.

        Raises:
            BadInput: any node's, on all ranks.
        """
        return self.wait_for_slow_work(work if self.local_rank == 0 else None)

    def run_and_gather(self, work: Callable[[], T]) -> list[T]:
        """Slow work of every rank, however long the slowest takes: what it gave, by rank.

        Raises:
            BadInput: any rank's, on all.
        """
        return [
            found for found in self.all_gather(self.wait_for_slow_work(work)) if found is not None
        ]

    def wait_for_slow_work(self, work: Callable[[], T] | None) -> T | None:
        outcome: Future[T | None] = Future()

        def run(work: Callable[[], T]) -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        if work is not None:
            threading.Thread(target=run, args=(work,), daemon=True).start()
        else:
            outcome.set_result(None)
        # In short turns: one collective would give up after the engine's timeout.
        while self.any_rank(not wait([outcome], TURN_SECONDS).done):
            pass
        return self.run_on_all(outcome.result)

    def load_once_per_node(self, load: Callable[[], T]) -> T:
        """What every rank loads, first by one rank of each node: the others map what it made.

        Raises:
            BadInput: on all ranks together.
        """
        found = self.run_on_each_node(load)
        rest = self.run_on_all(lambda: load() if found is None else None)
        result = rest if found is None else found
        assert result is not None
        return result

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
