"""Work on many batches in processes beside this one. Imports no torch."""

from __future__ import annotations

import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from trainer.runtime.process import die_with_parent

T = TypeVar("T")

#: One process cannot feed more of them with texts.
MOST_WORKERS = 16

_work: Callable[..., Any]


def in_order(
    work: Callable[..., T], batches: Iterable[tuple[Any, ...]], *, here: bool = False
) -> Iterator[T]:
    """``work(*batch)`` of every batch, in the order of the batches, by as many workers as cores.

    Only a few batches are under way at a time, so memory does not grow with their number. Workers
    are new processes, not forks: a fork of a process with threads may hang. They end with this
    process, however it ends.

    Args:
        work: sent to each worker once; where it cannot be sent, it is done here.
        here: do it in this process.

    Raises:
        Exception: what ``work`` raised for the first batch that failed.
    """
    workers = min(MOST_WORKERS, num_cores())
    sent = None if here or workers < 2 else _sendable(work)
    if sent is None:
        for batch in batches:
            yield work(*batch)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (sent,))
    under_way: deque[Future[T]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_do, batch))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sendable(work: Any) -> bytes | None:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError):  # a tokenizer of a person's own
        return None


def _start(sent: bytes) -> None:
    global _work
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends us in order
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    _work = pickle.loads(sent)


def _do(batch: tuple[Any, ...]) -> Any:
    return _work(*batch)
