"""An exclusive lock on a file, which the kernel releases when its holder ends."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.runtime.errors import BadInput


@contextmanager
def exclusive(path: Path, problem: str) -> Iterator[None]:
    """Hold the lock of a file, which is created if needed; its content does not change.

    On a file system without locks, such as Lustre without the mount option flock, every process
    acquires it.

    Raises:
        BadInput: with ``problem``, if another process has the lock.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BadInput(problem) from None
        yield
