"""Rows whose used columns are plain text or whole numbers, read and checked in columns.

Reading row by row (checks.py) explains every mistake, and takes tens of microseconds per row. Most
files have no mistake: here they are parsed and checked by Arrow, in batches. Whatever is not
certainly good raises ``NeedsRowwiseCheck``, and the file is read row by row. Both give the same.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Task, template_fields
from trainer.data.column_parsers import has_nested
from trainer.data.data_files import DataFile
from trainer.data.json_reader import json_lines
from trainer.data.row_validation import columns_used
from trainer.data.text_readers import BOM, FileRecord, format_of, open_text
from trainer.runtime.errors import BadInput

LINE = "line of the file"  #: a column of our own beside those of the file
_BLOCK_BYTES = 1 << 22
_BATCH = 1 << 13
# Python's and Arrow's parsers disagree about these; inside a text they are harmless, but rare.
_NOT_JSON = re.compile(rb"[:,\[]\s*-?(?:NaN|Infinity)")


class NeedsRowwiseCheck(Exception):
    """The rows need a closer look."""


def plain_batches(origin: DataFile, task: Task) -> Iterator[Any]:
    """Record batches of the used columns, and of ``LINE`` where the format has lines.

    Every column is ``string`` or ``int64`` throughout.

    Raises:
        Odd: something is not plain, perhaps wrong.
    """
    if has_nested(task):
        raise NeedsRowwiseCheck
    used = list(columns_used(task))
    rows = 0
    try:
        for batch in _read(origin, used):
            _check(batch, task)
            rows += batch.num_rows
            yield batch
    except BadInput as error:
        raise NeedsRowwiseCheck from error
    if rows == 0:
        raise NeedsRowwiseCheck


def _read(origin: DataFile, used: Sequence[str]) -> Iterator[Any]:
    if origin.table is not None:
        if not all(map(origin.table.is_plain, used)):
            raise NeedsRowwiseCheck
        yield from _of_table(origin.table.batches(used), used)
    elif format_of(origin.files[0]) == ".jsonl":
        yield from _of_jsonl(origin.files[0], used)
    else:
        records = iter(origin.records(used))
        schema = None
        while some := list(islice(records, _BATCH)):
            schema = schema or _schema(some[0], used)
            yield _of_records(some, schema)


def _of_table(batches: Iterator[Any], used: Sequence[str]) -> Iterator[Any]:
    """Columns of other types (floats, dates, lists) are read value by value."""
    import pyarrow as pa
    from pyarrow import types

    for batch in batches:
        columns = []
        for name in used:
            if name not in batch.schema.names:
                raise NeedsRowwiseCheck
            column = batch.column(name)
            kind = column.type.value_type if types.is_dictionary(column.type) else column.type
            text = types.is_string(kind) or types.is_large_string(kind)
            if not text and not types.is_integer(kind):
                raise NeedsRowwiseCheck
            try:
                columns.append(column.cast(pa.string() if text else pa.int64()))
            except pa.ArrowInvalid:
                raise NeedsRowwiseCheck from None
        yield pa.RecordBatch.from_arrays(columns, names=list(used))


def _of_jsonl(file: Path, used: Sequence[str]) -> Iterator[Any]:
    schema, rest, row, line = None, b"", 1, 1
    with open_text(file) as stream:
        while read := stream.read(_BLOCK_BYTES):
            block = (rest or b"") + read
            cut = block.rfind(b"\n") + 1
            block, rest = block[:cut], block[cut:]
            if block:
                schema = schema or _schema_of_block(block, used)
                batch = _of_block(block, schema, row, line)
                row, line = row + batch.num_rows, line + block.count(b"\n")
                yield batch
    if rest.strip():
        yield _of_block(rest + b"\n", schema or _schema_of_block(rest, used), row, line)


def _of_block(block: bytes, schema: Any, row: int, line: int) -> Any:
    """Whole lines of JSON as one batch; a block that Arrow may misread is read by Python."""
    import pyarrow as pa
    from pyarrow import json

    block = block.removeprefix(BOM) if line == 1 else block
    try:
        if not _is_one_object_per_line(block) or _NOT_JSON.search(block):
            raise ValueError
        block.decode("utf-8")  # Arrow looks at the used columns only
        table = json.read_json(
            io.BytesIO(block),
            read_options=json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        ).combine_chunks()
        table.validate(full=True)
        # Lines end with } and begin with {, which in JSON happens between objects only: as many
        # objects as lines means one on each.
        if table.num_rows != block.count(b"\n"):
            raise ValueError
    except (pa.ArrowException, ValueError):
        records = list(json_lines(io.BytesIO(block), row, line))
        if not records:
            raise NeedsRowwiseCheck from None
        return _of_records(records, schema)
    lines = pa.array(np.arange(line, line + table.num_rows))
    columns = [table[name].combine_chunks() for name in schema.names]
    columns = [c.chunk(0) if isinstance(c, pa.ChunkedArray) else c for c in columns]
    return pa.RecordBatch.from_arrays([*columns, lines], names=[*schema.names, LINE])


def _is_one_object_per_line(block: bytes) -> bool:
    if not (block.startswith(b"{") and block.endswith(b"}\n")):
        return False
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    return bool((data[ends - 1] == ord("}")).all() and (data[ends[:-1] + 1] == ord("{")).all())


def _schema_of_block(block: bytes, used: Sequence[str]) -> Any:
    first = next(json_lines(io.BytesIO(block)), None)
    if first is None:
        raise NeedsRowwiseCheck
    return _schema(first, used)


def _schema(record: FileRecord, used: Sequence[str]) -> Any:
    import pyarrow as pa

    kinds = {str: pa.string(), int: pa.int64()}
    found = [(name, kinds.get(type(record.values.get(name)))) for name in used]
    if any(kind is None for _, kind in found):
        raise NeedsRowwiseCheck
    return pa.schema(found)


def _of_records(records: Sequence[FileRecord], schema: Any) -> Any:
    import pyarrow as pa

    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        wanted = str if kind == pa.string() else int
        values = [record.values.get(name) for record in records]
        if any(type(value) is not wanted for value in values):
            raise NeedsRowwiseCheck
        try:
            columns.append(pa.array(values, kind))
        except (OverflowError, pa.ArrowInvalid, UnicodeEncodeError):
            raise NeedsRowwiseCheck from None
    names = list(schema.names)
    if records[0].line is not None:
        columns.append(pa.array([record.line for record in records], pa.int64()))
        names.append(LINE)
    return pa.RecordBatch.from_arrays(columns, names=names)


def _check(batch: Any, task: Task) -> None:
    """What ``RowCheck`` asks of rows, by column."""
    import pyarrow as pa
    from pyarrow import compute

    names = [name for name in batch.schema.names if name != LINE]
    if any(batch.column(name).null_count for name in names):
        raise NeedsRowwiseCheck
    for template in (task.input, task.target):
        blank = None
        for name in template_fields(template):
            column = batch.column(name)
            if column.type != pa.string():
                blank = None
                break
            empty = compute.equal(compute.utf8_trim_whitespace(column), "")
            blank = empty if blank is None else compute.and_(blank, empty)
        if blank is not None and compute.any(blank).as_py():
            raise NeedsRowwiseCheck
    if task.choices is not None:
        column = batch.column(template_fields(task.target)[0]).cast(pa.string())
        if not compute.all(compute.is_in(column, pa.array(task.choices, pa.string()))).as_py():
            raise NeedsRowwiseCheck
