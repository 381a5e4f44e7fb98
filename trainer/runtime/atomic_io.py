"""Replace files atomically: readers see the old or the new content. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from trainer.runtime.json_file import to_json


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces ``path`` at the end, or is deleted after an error.

    Two processes must not write the same path at the same time.

    Args:
        durable: fsync the file first, so that a power failure leaves no empty file. The caller must
            fsync the folder if the new file must survive, too.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged.
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
            error.filename = str(path)  # errors of a full disk do not name the file
        raise


def write(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Replace the content of a file; text is written as UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of a file with ``value`` as JSON; null: a number that is not finite."""
    write(path, to_json(value, indent=2) + "\n")
