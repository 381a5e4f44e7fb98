"""CPU time limit for Python code that may not terminate."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_POLL_SECONDS = 0.1
#: Number of idle polls after which the watching thread ends.
_IDLE_POLLS = 50


class CpuLimitExceeded(Exception):
    """A block of ``cpu_limit`` has exceeded its CPU time."""


class _Watcher:
    """A thread that watches all blocks of ``cpu_limit`` in this process, while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: dict[int, float] = {}  # thread -> CPU time at which its block is aborted
        self._aborted: set[int] = set()
        self._is_running = False

    def begin(self, seconds: float) -> None:
        with self._lock:
            thread = threading.get_ident()
            self._limits[thread] = _cpu_seconds(thread) + seconds
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        with self._lock:
            thread = threading.get_ident()
            del self._limits[thread]
            if thread in self._aborted:  # the exception must not arrive after the block
                self._aborted.remove(thread)
                _raise_in(thread, None)

    def _watch(self) -> None:
        idle = 0
        while idle < _IDLE_POLLS:
            time.sleep(_POLL_SECONDS)
            with self._lock:
                idle = 0 if self._limits else idle + 1
                self._is_running = idle < _IDLE_POLLS
                for thread, limit in self._limits.items():
                    if thread not in self._aborted and _cpu_seconds(thread) > limit:
                        self._aborted.add(thread)
                        _raise_in(thread, CpuLimitExceeded)


_watcher = _Watcher()


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Abort a block of Python code after ``seconds`` of CPU time of this thread.

    CPU time instead of wall time, because a process may be suspended or wait for a core. Works in
    any thread; a signal handler would run in the main thread only.

    Raises:
        CpuLimitExceeded: at any point inside the block.
    """
    _watcher.begin(seconds)
    try:
        yield
    finally:
        _watcher.end()


def _cpu_seconds(thread: int) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread of this process; None: cancel one that has not arrived."""
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
