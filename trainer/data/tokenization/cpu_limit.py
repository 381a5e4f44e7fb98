"""A limit on the CPU time of Python code that may never end."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_TURN_SECONDS = 0.1
#: Turns without work after which the watching thread ends.
_IDLE_TURNS = 50


class CpuLimitExceeded(Exception):
    """The code has used more CPU time than it may."""


class _Watcher:
    """One thread that looks after all limited blocks of this process, while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: dict[int, float] = {}  # thread -> its CPU time at which the block is ended
        self._ended: set[int] = set()
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
            if thread in self._ended:  # what has not arrived yet must not arrive after the block
                self._ended.remove(thread)
                _raise_in(thread, None)

    def _watch(self) -> None:
        idle = 0
        while idle < _IDLE_TURNS:
            time.sleep(_TURN_SECONDS)
            with self._lock:
                idle = 0 if self._limits else idle + 1
                self._is_running = idle < _IDLE_TURNS
                for thread, limit in self._limits.items():
                    if thread not in self._ended and _cpu_seconds(thread) > limit:
                        self._ended.add(thread)
                        _raise_in(thread, CpuLimitExceeded)


_watcher = _Watcher()


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Run a block of Python code, for so many seconds of CPU time of this thread at most.

    CPU time, not time on the clock: a process that is suspended, or waits for a core, is not at
    fault. It works in any thread, where a signal would reach the main thread only.

    Raises:
        TookTooLong: in the middle of the block.
    """
    _watcher.begin(seconds)
    try:
        yield
    finally:
        _watcher.end()


def _cpu_seconds(thread: int) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread of this process; None: take back one that has not arrived."""
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
