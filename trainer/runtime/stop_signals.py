"""Stop signals of a rank: immediate while a run loads, deferred to the next step while it trains.

A run that trains has to stop on all ranks together, with its state saved. A signal therefore only
sets a flag; the ranks exchange their flags in the all-reduce at the end of a step, so a signal to
one of them is enough. Further signals while they save have no effect.

While a run loads, only the rank that receives the signal stops, and the others lose their
connection to it. A file in ``logs`` informs them of the reason.
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


_received = False
_deferred = False


def install_handlers() -> None:
    """Make stop signals interrupt this process as Ctrl-C does, and unblock them."""
    global _received, _deferred
    _received = _deferred = False
    for number in SIGNALS:
        # A background job of a shell ignores Ctrl-C.
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def defer() -> None:
    """From now on, only record stop signals; ``stop_requested`` returns them."""
    global _deferred
    _deferred = True


def stop_requested() -> bool:
    """Whether this process has received a stop signal."""
    return _received


def write_stop_file(logs: Path) -> None:
    """Write a file for the ranks that lose their connection to this one."""
    with suppress(OSError):
        (logs / FILE).write_text("a rank was stopped by a signal\n")


def stopped_since(logs: Path, since: float) -> bool:
    """Whether a rank was stopped by a signal after a time in Unix seconds."""
    try:
        return (logs / FILE).stat().st_mtime >= since
    except OSError:
        return False


def _handle(_: int, __: FrameType | None) -> None:
    global _received
    _received = True
    if not _deferred:
        raise KeyboardInterrupt
