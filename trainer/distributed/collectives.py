"""Collectives over all ranks, and slow work that some ranks do while the others wait.

Each collective is recorded in a ``CollectiveTracker``, which the watchdog reads.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.watchdog import CollectiveTracker, Watchdog, end_process
from trainer.runtime.errors import BadInput

T = TypeVar("T")

#: Seconds between two collectives of ranks that wait for slow work.
POLL_SECONDS = 1.0
#: Watchdog timeout as a share of that of collectives: the watchdog aborts first and names the rank.
WATCHDOG_SHARE = 0.9


class Ranks:
    """This rank and its collectives with the others; torch.distributed must be initialized.

    Methods that run work raise BadInput on all ranks together, with the problems of the first rank
    whose work raised BadInput.
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
        self.tracker = CollectiveTracker()
        self._timeout = timeout_seconds
        self._watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start_watchdog(self, logs: Path, silence_seconds: float) -> None:
        """Start the watchdog, which ends all ranks if one hangs; the reason is kept in ``logs``."""
        if self.world_size == 1:
            return
        # A separate connection, so that the watchdog's requests do not delay the main thread's.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=self._timeout),
            wait_for_workers=False,
        )
        self._watchdog = Watchdog(
            self.tracker,
            store,
            self.rank,
            self.world_size,
            socket.gethostname(),
            silence_seconds=silence_seconds,
            timeout_seconds=WATCHDOG_SHARE * self._timeout,
            abort=partial(end_process, logs),
        )
        self.any_rank(False)  # a barrier: every rank has sent its first heartbeat
        self._watchdog.start()

    @contextmanager
    def held_on_main(self, lock: AbstractContextManager[object] | None) -> Iterator[None]:
        """Hold a lock on rank 0; all ranks raise ``BadInput`` if it is not free.

        Args:
            lock: None on other ranks.
        """
        self.run_on_all(lambda: None if lock is None else lock.__enter__())
        try:
            yield
        finally:
            if lock is not None:
                lock.__exit__(None, None, None)

    def training_step(self, step: int) -> AbstractContextManager[None]:
        """Record a training step; the watchdog compares its duration with earlier steps."""
        return self.tracker.training_step(step)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place, in one collective."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self.tracker.during("all_reduce of sums"):
            dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        value = torch.tensor([int(flag)], device=self.device)
        with self.tracker.during("all_reduce of status flags"):
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
            return bool(value.item())

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank. For small plain data."""
        if self.world_size == 1:  # no copies to a GPU and back for each generated token
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.tracker.during("all_gather of values"):
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value on every rank. For small plain data and small CPU tensors."""
        if self.world_size == 1:
            return cast(T, value)
        values: list[Any] = [value]
        with self.tracker.during("broadcast from rank 0"):
            dist.broadcast_object_list(values, 0)
        result: T = values[0]
        return result

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run quick work on every rank and return this rank's result."""
        result: T | None = None
        problems: list[str] = []
        try:
            result = work()
        except BadInput as error:
            problems = error.problems
        first = next((p for p in self.all_gather(problems) if p), None)
        if first is not None:
            raise BadInput(first)
        return result  # type: ignore[return-value]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run quick work on rank 0 and broadcast its result: plain data, small CPU tensors."""
        return self.broadcast(self.run_on_all(lambda: work() if self.is_main else None))

    def run_on_each_node(self, work: Callable[[], T]) -> T | None:
        """Run slow work on the first rank of every node; the others wait and return None."""
        return self._wait_for_all(work if self.local_rank == 0 else None)

    def run_and_gather(self, work: Callable[[], T]) -> list[T]:
        """Run slow work on every rank and return all results by rank."""
        results = self.all_gather(self._wait_for_all(work))
        return [result for result in results if result is not None]

    def load_once_per_node(self, load: Callable[[], T]) -> T:
        """Load on each node's first rank, then on the others, which map the files it wrote."""
        loaded = self.run_on_each_node(load)
        result = self.run_on_all(lambda: load() if loaded is None else loaded)
        assert result is not None
        return result

    def _wait_for_all(self, work: Callable[[], T] | None) -> T | None:
        """Run work in a thread and wait until all ranks are done; None: only wait."""
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
        # Poll with short collectives: a single one would exceed its timeout.
        while self.any_rank(not wait([outcome], POLL_SECONDS).done):
            pass
        return self.run_on_all(outcome.result)

    def wait_for_main(self) -> None:
        """Wait on the other ranks until rank 0 has called ``close`` or ended.

        Rank 0 may write results for minutes, and srun kills it some time after the first task of
        another node has ended (``WAIT_SECONDS`` of ``launch/slurm.py``). Not part of ``close``,
        which is also called after an error, when rank 0 may be waiting for this rank.
        """
        if self._watchdog is not None:
            self._watchdog.wait_for_rank_0()

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
