"""Stop signals of a rank: immediate while loading, deferred to the end of the step in training.

In training, all ranks must stop after the same step and save their state. A signal therefore only
sets a flag. Ranks combine their flags in the all-reduce at the end of a step, so a signal to one
rank is enough. Further signals while saving have no effect.

While loading, the rank that receives the signal stops at once, and the connections of the other
ranks to it fail. They read the reason from a file in ``logs``.

Python calls signal handlers between two instructions of the main thread, so never while C++ code
waits for ranks that do not connect. A ``KeyboardInterrupt`` can also be lost: Python ignores it in
``__del__`` and while it loads a compiled module, and libraries may catch it. A thread ends the
process in both cases.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

FILE = "stopped.txt"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
#: Seconds after a signal until the main thread is considered blocked.
BLOCKED_SECONDS = 3.0
#: Seconds after a signal until its ``KeyboardInterrupt`` is considered lost. Must be less than
#: ``LOSS_SECONDS``, after which the launcher kills ranks.
LOST_SECONDS = 5.0


class Stopped(KeyboardInterrupt):
    """All ranks stop after the same step, because one of them received a stop signal."""


_received = False
_deferred = False
_ending = threading.Event()


def install_handlers(end: Callable[[], object]) -> None:
    """Make stop signals raise ``KeyboardInterrupt``, and unblock them.

    Args:
        end: ends the process; called in a thread if a signal does not end the main thread while
            loading (see ``ending``).
    """
    global _received, _deferred
    _received = _deferred = False
    _ending.clear()
    for number in SIGNALS:
        # Background jobs of a shell ignore SIGINT.
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_end_if_blocked, args=(reading, end), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def defer() -> None:
    """From now on, stop signals only set the flag of ``stop_requested``."""
    global _deferred
    _deferred = True


def deferred() -> bool:
    """Whether ``defer`` was called: the rank has loaded everything and trains."""
    return _deferred


def ending() -> None:
    """State that the main thread is ending the process because of a signal."""
    _ending.set()


def stop_requested() -> bool:
    """Whether this process has received a stop signal."""
    return _received


def interrupted() -> bool:
    """Whether a stop signal raised ``KeyboardInterrupt``.

    A library can turn it into another error: an import that it ends may fail in a different way.
    """
    return _received and not _deferred


def write_stop_file(logs: Path) -> None:
    """Tell other ranks that this rank was stopped by a signal (see ``stopped_since``)."""
    with suppress(OSError):
        (logs / FILE).write_text("a rank was stopped by a signal\n")


def stopped_since(logs: Path, since: float) -> bool:
    """Whether a signal has stopped a rank since a time in Unix seconds."""
    try:
        return (logs / FILE).stat().st_mtime >= since
    except OSError:
        return False


def _end_if_blocked(signals: int, end: Callable[[], object]) -> None:
    """Wait for signals, whose numbers Python writes into a pipe at once."""
    while number := os.read(signals, 1):
        if number[0] in SIGNALS and not _deferred:
            _ending.wait(BLOCKED_SECONDS)
            if _received:
                _ending.wait(LOST_SECONDS - BLOCKED_SECONDS)
            if not _ending.is_set() and not _deferred:
                end()


def _handle(_: int, __: FrameType | None) -> None:
    global _received
    _received = True
    if not _deferred:
        raise KeyboardInterrupt
