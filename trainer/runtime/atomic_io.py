"""Replace files atomically: a reader sees the old content or the new one.

Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces ``path`` at the end, or is deleted after an error.

    Only one process at a time may write a path.

    Args:
        durable: fsync the file first, so that a power failure leaves no empty file. The caller
            syncs the folder, if its entry must survive as well.

    Raises:
        OSError: the disk is full or cannot be written; ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # never through a symlink
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not name the file
        raise


def write(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Replace the content of a file; text is written as UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of a file by ``value`` as JSON."""
    write(path, json.dumps(value, indent=2) + "\n")
