"""Standard streams of a rank: only rank 0 writes to the terminal. Standard library only.

``promptshard train`` redirects the stdout of the launcher to a log file. Ranks inherit
descriptor 0 from the launcher unchanged, so it carries the user's stdout (``isatty`` works), and
``PROMPTSHARD_STDOUT_FD`` is set to 0. With ``deepspeed --module trainer``, the user's stdout is
descriptor 1 as usual.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

VARIABLE = "PROMPTSHARD_STDOUT_FD"


class DroppingStream(io.TextIOWrapper):
    """A stream that drops text instead of raising if its reader has exited or the disk is full.

    Ctrl-C also ends a ``tee`` that reads the output, but the run must still save its state.

    Attributes:
        lost: why text could not be written; empty if it was, or if its reader has exited.
    """

    def __init__(self, descriptor: int, *, close: bool = True) -> None:
        self.lost = ""
        raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=close))
        super().__init__(raw, encoding="utf-8", errors="replace", line_buffering=True)

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    @property
    def problem(self) -> str:
        """An error if text is lost, else an empty text."""
        return f"stdout: the result is not written: {self.lost}" if self.lost else ""

    def _drop(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.lost = error.strerror or str(error)


def keep_streams() -> None:
    """Make stdout and stderr ``DroppingStream``, and open closed standard descriptors."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next opened file would get this descriptor
            opened = os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
            os.set_inheritable(opened, True)
    sys.stdout, sys.stderr = DroppingStream(1, close=False), DroppingStream(2, close=False)


def lost_output() -> str:
    """Return an error if text for stdout is lost on a full disk, else an empty text."""
    sys.stdout.flush()
    return sys.stdout.problem if isinstance(sys.stdout, DroppingStream) else ""


def open_private(log: Path) -> int:
    """Open a log for appending; return the descriptor.

    Only the owner can read the log: library messages may contain passwords, for example of MLflow.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with suppress(OSError):  # the log may belong to another user
        os.fchmod(descriptor, 0o600)
    return descriptor


def claim(rank: int, log: Path) -> tuple[DroppingStream, DroppingStream]:
    """Redirect descriptors 1 and 2 to ``log``; return streams to the user's stdout and stderr.

    Libraries, child processes and C code then write to the log. Call this before importing them. On
    ranks other than 0, the returned streams write to /dev/null.
    """
    descriptor = os.environ.pop(VARIABLE, None)
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0:
        out, err = os.dup(int(descriptor) if descriptor else 1), os.dup(2)
    else:
        out, err = (os.open(os.devnull, os.O_WRONLY) for _ in range(2))
    log.parent.mkdir(parents=True, exist_ok=True)
    log_file = open_private(log)
    os.utime(log)  # the command line detects by it that this rank has started
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log_file, 1), (log_file, 2)):
        os.dup2(source, target)
    os.close(log_file)
    os.close(nothing)
    return DroppingStream(out), DroppingStream(err)
