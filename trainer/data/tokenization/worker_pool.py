"""Pool of worker processes that map batches in order. Imports no torch."""

from __future__ import annotations

import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from trainer.runtime.limits import num_cores
from trainer.runtime.process import die_with_parent

T = TypeVar("T")

#: One process cannot supply more workers with texts.
MAX_WORKERS = 16

_work: Callable[..., Any]


def map_in_order(
    work: Callable[..., T], batches: Iterable[tuple[Any, ...]], *, in_process: bool = False
) -> Iterator[T]:
    """Yield ``work(*batch)`` of every batch, in order, using as many workers as cores.

    Only a few batches are in flight at a time, so memory does not grow with their number. Workers
    are spawned, because a forked process with threads may hang. They end with this process.

    Args:
        work: sent to each worker once; it runs in this process if it cannot be pickled, or if the
            system cannot start workers.
        in_process: use no workers.

    Raises:
        Exception: of the first batch that failed.
    """
    workers = min(MAX_WORKERS, num_cores())
    pickled = None if in_process or workers < 2 else _pickle(work)
    pool = None if pickled is None else _pool(workers, pickled)
    if pool is None:
        for batch in batches:
            yield work(*batch)
        return
    in_flight: deque[Future[T]] = deque()
    try:
        for batch in batches:
            in_flight.append(pool.submit(_run, batch))
            if len(in_flight) > 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int, pickled: bytes) -> ProcessPoolExecutor | None:
    """Start a pool; None where semaphores cannot be made, as without a writable /dev/shm."""
    try:
        return ProcessPoolExecutor(workers, get_context("spawn"), _start, (pickled,))
    except (OSError, NotImplementedError):
        return None


def _pickle(work: Any) -> bytes | None:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError):  # a custom tokenizer
        return None


def _start(pickled: bytes) -> None:
    global _work
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent shuts the pool down
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    _work = pickle.loads(pickled)


def _run(batch: tuple[Any, ...]) -> Any:
    return _work(*batch)
