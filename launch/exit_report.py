"""Derive exit code and message of a run from how its processes ended."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.runtime.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_PORT_TAKEN,
    EXIT_RESUMABLE,
)
from trainer.runtime.process import rerun

#: Beginning of the last line of a launcher's log, which is the message of the ``ExitReport``.
VERDICT = "promptshard: "
KILLED = " was killed by "
#: Message in the launcher's log if the ranks refused the input; they have printed why.
REFUSED = "invalid input"


@dataclass(frozen=True)
class ExitReport:
    """Exit code of ``promptshard``, and a message if rank 0 has not printed one.

    Attributes:
        port_taken: the ranks did not start, because another process used their port.
    """

    code: int
    message: str = ""
    port_taken: bool = False


def describe(
    returncode: int,
    stopped: Sequence[signal.Signals],
    log: Path,
    *,
    lost: bool,
    resumable: bool,
    first: tuple[str, int] = ("", 0),
    hung: str = "",
    error: str = "",
) -> ExitReport:
    """Derive the exit code, and a message if no rank can have printed one.

    Args:
        lost: rank 0 did not mark its work as finished.
        first: the rank that failed first, and the signal that killed it (0: none).
        hung: why the watchdog aborted the run; empty if it did not.
        resumable: rerunning the command resumes a stopped run.
        error: error of the rank that failed first, unless it has printed it.
    """
    if returncode == EXIT_DONE and not lost:
        return ExitReport(EXIT_DONE)
    if returncode in (EXIT_BAD_INPUT, EXIT_RESUMABLE):
        return ExitReport(returncode)  # rank 0 has printed why
    if stopped:
        message = f"Stopped by {stopped[0].name}; all processes have ended."
        if resumable:
            return ExitReport(EXIT_RESUMABLE, f"{message} {rerun()} to resume.")
        return ExitReport(EXIT_FAILURE, message)
    if returncode == EXIT_PORT_TAKEN:
        return ExitReport(EXIT_FAILURE, "the rendezvous port is used by another process", True)
    if hung:
        how = hung
    elif returncode == EXIT_DONE:
        how = "the processes ended with exit code 0, but rank 0 did not finish its work"
    else:
        who, by = first
        who = who or ("the launcher" if returncode < 0 else "a process")
        how = _describe(-by or returncode, who) + (f": {error}" if error else "")
    return ExitReport(EXIT_FAILURE, f"{how}; see the logs in {log.parent}")


def _describe(returncode: int, who: str) -> str:
    """Describe an exit code; the launcher's ``sys.exit(-9)`` for signal 9 arrives as 247."""
    number = -returncode if returncode < 0 else 256 - returncode if returncode > 192 else 0
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"{who} ended with exit code {returncode}"
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    return f"{who}{KILLED}{name}{hint}"
