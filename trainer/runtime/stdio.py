"""Streams to the terminal: only rank 0 writes there. Imports only the standard library.

``promptshard train`` sends the DeepSpeed launcher's stdout to a log file. The launcher hands file
descriptor 0 to its ranks untouched, so the person's stdout travels there, and
``PROMPTSHARD_STDOUT_FD`` says so: it stays the real terminal, pipe or file, and ``isatty`` holds.
Started by hand with ``deepspeed --module trainer``, stdout is where it always is.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

VARIABLE = "PROMPTSHARD_STDOUT_FD"


class DroppingStream(io.TextIOWrapper):
    """A stream that drops text, instead of raising, when its reader is gone or its disk is full.

    A Ctrl-C also ends the ``tee`` behind a pipe, just when the run is to be saved.
    """

    def __init__(self, descriptor: int, *, close: bool = True) -> None:
        raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=close))
        super().__init__(raw, encoding="utf-8", errors="replace", line_buffering=True)

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def keep_streams() -> None:
    """Let this process continue when nobody reads its stdout or stderr, or their disk is full."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would be taken for it
            opened = os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
            os.set_inheritable(opened, True)
    sys.stdout, sys.stderr = DroppingStream(1, close=False), DroppingStream(2, close=False)


@dataclass(frozen=True)
class Terminal:
    """Streams to the person; on ranks other than 0 they lead nowhere."""

    out: TextIO
    err: TextIO


def private(log: Path) -> int:
    """Return a descriptor that appends to a log which only its owner may read.

    A message of a library may hold a password, of the tracker for example.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with suppress(OSError):  # the log of an earlier run may be another user's
        os.fchmod(descriptor, 0o600)
    return descriptor


def claim(rank: int, log: Path) -> Terminal:
    """Take the terminal for rank 0 and send all other output of this process to ``log``.

    Libraries, child processes and C code write to descriptors 1 and 2, which lead to ``log`` from
    now on. Call it before anything that chatters is imported.
    """
    given = os.environ.pop(VARIABLE, None)
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0:
        out, err = os.dup(int(given) if given else 1), os.dup(2)
    else:
        out, err = (os.open(os.devnull, os.O_WRONLY) for _ in range(2))
    log.parent.mkdir(parents=True, exist_ok=True)
    chatter = private(log)
    os.utime(log)  # the command line sees that this rank has started
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (chatter, 1), (chatter, 2)):
        os.dup2(source, target)
    os.close(chatter)
    os.close(nothing)
    return Terminal(
        out=DroppingStream(out),
        err=DroppingStream(err),
    )
