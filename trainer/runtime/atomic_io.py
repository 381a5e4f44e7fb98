"""Files that are replaced in one go: a reader finds the old one or the new one, whole.

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
    """A file to write that takes the place of ``path`` in the end, or is gone if that fails.

    Only one process may write a path at a time.

    Args:
        durable: flushed to the disk first, so that a power cut leaves no empty file. The entry in
            its folder is not: a caller that needs it flushes the folder.

    Raises:
        OSError: if the disk is full or cannot be written; ``path`` is as it was then.
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
    """Replace a file by this content; text is written as UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2) + "\n")
