"""Ingest one data file: checked rows in memory-mapped Arrow, with a hash of each row.

Files that ``arrow_reader`` accepts are read by column. All others are read row by row: every
mistake is reported with its line, and values are stored exactly, as JSON text. Imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import xxhash

from trainer.config import Task, template_fields
from trainer.data.arrow_reader import LINE, NeedsRowwiseCheck, read_columns
from trainer.data.column_parsers import content_text, kept_nulls
from trainer.data.data_files import DataFile
from trainer.data.row_validation import Problems, RowValidator, columns_used, content_columns
from trainer.data.text_readers import place
from trainer.runtime.errors import BadInput

#: Called with the name of a file and the number of its rows read, a few times per second.
OnRows = Callable[[str, int], None]

HASH = "hash of the row"  #: column added for 64 bits of the content of each row
_ROW = "row as JSON"
_BATCH_ROWS = 1 << 12


@dataclass(frozen=True)
class IngestedFile:
    """Checked rows of one file.

    Attributes:
        name: of the file, for messages.
        columns: all columns of the file.
        digest: SHA-256 of the file's bytes, in hex.
        batches: memory-mapped ``pyarrow.RecordBatch``: the used columns, or the row as JSON text;
            ``HASH``; and ``LINE`` if the format has lines.
    """

    name: str
    columns: list[str]
    digest: str
    batches: list[Any]

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self.batches)

    def values(self, batch: Any) -> Iterator[dict[str, Any]]:
        """Yield the rows of a batch: the used columns with the values of the file."""
        if _ROW in batch.schema.names:
            yield from map(json.loads, batch.column(_ROW).to_pylist())
            return
        names = [name for name in batch.schema.names if name not in (HASH, LINE)]
        columns = [batch.column(name).to_pylist() for name in names]
        yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))

    def where(self, batch: Any, index: int, row: int) -> str:
        """Return the place of row ``row`` of the file, which is row ``index`` of the batch."""
        lines = batch.column(LINE) if LINE in batch.schema.names else None
        return place(self.name, row + 1, None if lines is None else lines[index].as_py())


def ingest(
    file: DataFile, task: Task, *, on_rows: OnRows | None = None
) -> tuple[Problems, IngestedFile | None]:
    """Read and check one file or table; return its problems, and its rows if there are none."""
    try:
        try:
            return Problems(file.name), _ingest_by_column(file, task, on_rows)
        except NeedsRowwiseCheck:
            return ingest_by_row(file, task, on_rows)
    except BadInput as error:  # the file cannot be read at all
        return Problems(file.name, unread=error.problems), None


def _ingest_by_column(file: DataFile, task: Task, on_rows: OnRows | None) -> IngestedFile:
    content = content_columns(task)

    def hashed() -> Iterator[Any]:
        num_rows = 0
        for batch in read_columns(file, task):
            values = [map(str, batch.column(name).to_pylist()) for name in content]
            hashes = [_hash("\0".join(row)) for row in zip(*values, strict=True)]
            num_rows += batch.num_rows
            if on_rows is not None:
                on_rows(file.name, num_rows)
            yield batch.append_column(HASH, np.array(hashes, np.uint64))

    batches = _write_mapped(hashed())
    columns = file.header() or list(next(file.records(list(columns_used(task)))).values)
    return IngestedFile(file.name, columns, file.digest(), batches)


def ingest_by_row(
    file: DataFile, task: Task, on_rows: OnRows | None = None
) -> tuple[Problems, IngestedFile | None]:
    """As ``ingest``, row by row; raises ``BadInput`` if the file cannot be read at all."""
    validator = RowValidator(file.name, task)
    try:
        header = file.header()
        batches = _write_mapped(_checked_batches(file, task, validator, on_rows))
    except BadInput as error:  # the rest of the file cannot be read
        validator.problems.unread += error.problems
        return validator.problems, None
    problems = validator.finish(header)
    if problems:
        problems.of_file += _problem_of_classes(file, task)
        if problems.of_file and (note := file.note_of_header()):
            problems.of_file.append(note)
        return problems, None
    return problems, IngestedFile(file.name, header or validator.names, file.digest(), batches)


def _checked_batches(
    file: DataFile, task: Task, validator: RowValidator, on_rows: OnRows | None
) -> Iterator[Any]:
    """Check every row; yield batches until the first problem, after which no rows are kept."""
    import pyarrow as pa

    content = content_columns(task)
    rows: list[str] = []
    lines: list[int | None] = []
    hashes: list[int] = []

    def batch() -> Any:
        arrays = [pa.array(rows), pa.array(lines, pa.int64()), np.array(hashes, np.uint64)]
        for values in (rows, lines, hashes):
            values.clear()
        return pa.record_batch(arrays, names=[_ROW, LINE, HASH])

    for record in file.records(list(columns_used(task)), kept_nulls(task)):
        row = validator.check(record)
        if on_rows is not None and validator.num_rows % _BATCH_ROWS == 0:
            on_rows(file.name, validator.num_rows)
        if row is None or validator.problems:
            continue
        rows.append(json.dumps(row))
        lines.append(record.line)
        hashes.append(_hash(content_text(row, content)))
        if len(rows) == _BATCH_ROWS:
            yield batch()
    if rows:
        yield batch()


def _hash(content: str) -> int:
    return xxhash.xxh3_64_intdigest(content.encode())


def _problem_of_classes(file: DataFile, task: Task) -> list[str]:
    """Report choices that are not class names, if the column has class names."""
    columns = template_fields(task.target) if task.choices else []
    column = columns[0] if columns else ""
    names = file.class_names(column)
    wrong = [choice for choice in task.choices or [] if names and choice not in names]
    return [
        f"{column}: its values are the names of its classes ({', '.join(names or [])}); "
        f"tasks.{task.name}.choices has {choice!r}: list the names"
        for choice in wrong[:1]
    ]


def _write_mapped(batches: Iterable[Any]) -> list[Any]:
    """Write Arrow record batches to an unnamed temporary file and map them into memory."""
    import pyarrow as pa

    file, writer = _ScratchFile(), None
    for batch in batches:
        writer = writer or pa.ipc.new_stream(file, batch.schema)
        writer.write_batch(batch)
    if writer is None:
        return []
    writer.close()
    return list(pa.ipc.open_stream(pa.py_buffer(file.mapped())))


class _ScratchFile(io.RawIOBase):
    """An unnamed temporary file, whose content moves to memory if the disk is full."""

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
            content = self._file.read(self._size)
            self._file = io.BytesIO()
            self._file.write(content + bytes(view))
        self._size += len(view)
        return len(view)

    def mapped(self) -> Any:
        """Return all written bytes, memory-mapped if they are on disk."""
        if isinstance(self._file, io.BytesIO):
            return self._file.getvalue()
        return mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
