"""Stop signals of this process: immediate while a run loads, between steps while it trains.

A run that trains must end on all ranks together, with its state saved, so a signal only sets a flag
here. Ranks exchange the flags in the all-reduce at the end of a step: a signal to one of them is
enough. Another signal while they save changes nothing.

While a run loads, the rank that gets the signal ends, and the others lose their connection to it:
a file in ``logs`` tells them why.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

FILE = "stopped.txt"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """All ranks have stopped together, because one of them received a stop signal."""


class _SignalState:
    """Attributes:
    left: a signal has come.
    waits: signals only leave word; before that they interrupt whatever is being done.
    """

    left = False
    waits = False


_word = _SignalState()


def install_handlers() -> None:
    """From now on signals interrupt this process as Ctrl-C does; those blocked so far come now."""
    _word.left = _word.waits = False
    for number in SIGNALS:
        # A shell's & has its jobs ignore Ctrl-C.
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _take)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def defer() -> None:
    """From now on signals wait until somebody asks."""
    _word.waits = True


def stop_requested() -> bool:
    """Whether this process received a stop signal."""
    return _word.left


def write_stop_file(logs: Path) -> None:
    """Leave a file for ranks that lose their connection to this one."""
    with suppress(OSError):
        (logs / FILE).write_text("a rank was stopped by a signal\n")


def stopped_since(logs: Path, since: float) -> bool:
    """Return whether a rank was stopped by a signal after a time, in Unix seconds."""
    try:
        return (logs / FILE).stat().st_mtime >= since
    except OSError:
        return False


def _take(_: int, __: FrameType | None) -> None:
    _word.left = True
    if not _word.waits:
        raise KeyboardInterrupt
