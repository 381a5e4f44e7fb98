"""Arrays and tables on disk: what grows with the number of rows does not stay in memory.

Files lie in the temporary folder and have no name, so nothing is left behind and two ranks never
meet. Where the folder cannot be written, the bytes stay in memory.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 18


class _Scratch(io.RawIOBase):
    """A file without a name that moves into memory when the disk does not take it."""

    def __init__(self) -> None:
        self._file: IO[bytes] = io.BytesIO()
        with contextlib.suppress(OSError):
            self._file = tempfile.TemporaryFile(prefix="promptshard-", buffering=0)  # noqa: SIM115
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            written = 0
            while written < len(view):
                written += self._file.write(view[written:])
        except OSError:  # the disk is full
            self._file.seek(0)
            whole = io.BytesIO()
            whole.write(self._file.read(self._size))
            whole.write(view)
            self._file = whole
        self._size += len(view)
        return len(view)

    def mapped(self) -> Any:
        """All bytes written, as a buffer: of the file's pages, not of memory."""
        if isinstance(self._file, io.BytesIO):
            return self._file.getvalue()
        if self._size == 0:  # nothing to map
            return b""
        return mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)


class DiskArrays:
    """An array of one type that is written piece by piece."""

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = _Scratch()

    def add(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())

    def array(self) -> NDArray[Any]:
        """All that was added, read-only."""
        return np.frombuffer(self._file.mapped(), self._dtype)


def write_table(schema: Any, batches: Iterable[Any]) -> list[Any]:
    """Arrow record batches, written to disk and mapped from there."""
    import pyarrow as pa

    file = _Scratch()
    with pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return list(pa.ipc.open_stream(pa.py_buffer(file.mapped())))


def chunks(size: int) -> Iterator[slice]:
    """Slices of a long array that are small enough to copy."""
    return (slice(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK))
