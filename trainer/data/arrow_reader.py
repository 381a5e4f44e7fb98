"""Read rows whose used columns are text or integers by column, as Arrow record batches.

Reading row by row (``row_validation``) explains every mistake, but takes tens of microseconds per
row. Arrow parses and checks JSON Lines files and tables about ten times as fast. If Arrow might
parse a value differently from Python, or a check fails, ``NeedsRowwiseCheck`` is raised and the
file is read row by row. Both ways give the same rows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Task, template_fields
from trainer.data.column_parsers import has_nested
from trainer.data.data_files import DataFile
from trainer.data.json_reader import json_lines
from trainer.data.row_validation import columns_used
from trainer.data.table_readers import Table
from trainer.data.text_readers import BOM, format_of, open_text
from trainer.runtime.errors import BadInput

LINE = "line of the file"  #: column added for the line number of each row
_BLOCK_BYTES = 1 << 22
# The parsers of Python and Arrow disagree about these. Matches inside a text only cost time.
_NOT_JSON = re.compile(rb"[:,\[]\s*-?(?:NaN|Infinity)")


class NeedsRowwiseCheck(Exception):
    """The file cannot be read column by column; it may contain a mistake."""


def read_columns(file: DataFile, task: Task) -> Iterator[Any]:
    """Yield ``pyarrow.RecordBatch`` of the used columns, and of ``LINE`` for JSON Lines.

    Every column has type ``string`` or ``int64`` and no null.

    Raises:
        NeedsRowwiseCheck: the format or a value's type is another one, or a check fails.
    """
    if has_nested(task):
        raise NeedsRowwiseCheck
    used = list(columns_used(task))
    num_rows = 0
    try:
        if file.table is not None:
            batches = _table_batches(file.table, used)
        elif format_of(file.files[0]) == ".jsonl":
            batches = _jsonl_batches(file.files[0], used)
        else:
            raise NeedsRowwiseCheck
        for batch in batches:
            if not _is_valid(batch, task):
                raise NeedsRowwiseCheck
            num_rows += batch.num_rows
            yield batch
    except BadInput as error:
        raise NeedsRowwiseCheck from error
    if num_rows == 0:
        raise NeedsRowwiseCheck


def _table_batches(table: Table, used: Sequence[str]) -> Iterator[Any]:
    """Yield the used columns of a table, which must be text or integers."""
    import pyarrow as pa
    from pyarrow import types

    if not all(map(table.is_plain, used)):
        raise NeedsRowwiseCheck
    for batch in table.batches(used):
        columns = []
        for name in used:
            if name not in batch.schema.names:
                raise NeedsRowwiseCheck
            column = batch.column(name)
            kind = column.type.value_type if types.is_dictionary(column.type) else column.type
            is_text = types.is_string(kind) or types.is_large_string(kind)
            if not is_text and not types.is_integer(kind):
                raise NeedsRowwiseCheck
            try:
                columns.append(column.cast(pa.string() if is_text else pa.int64()))
            except pa.ArrowInvalid:
                raise NeedsRowwiseCheck from None
        yield pa.RecordBatch.from_arrays(columns, names=list(used))


def _jsonl_batches(file: Path, used: Sequence[str]) -> Iterator[Any]:
    schema, rest, line = None, b"", 1
    with open_text(file) as stream:
        while data := stream.read(_BLOCK_BYTES):
            block, newline, rest = (rest + data).rpartition(b"\n")
            if block.strip():
                schema = schema or _schema(block, used)
                yield _parse_block(block, schema, line)
            line += block.count(b"\n") + len(newline)
    if rest.strip():
        yield _parse_block(rest, schema or _schema(rest, used), line)


def _parse_block(block: bytes, schema: Any, line: int) -> Any:
    """Parse complete lines as one batch; each must contain exactly one JSON object."""
    import pyarrow as pa
    from pyarrow import json

    block = (block.removeprefix(BOM) if line == 1 else block).rstrip() + b"\n"
    if not _has_object_per_line(block) or _NOT_JSON.search(block):
        raise NeedsRowwiseCheck
    try:
        block.decode("utf-8")  # Arrow checks the used columns only
        table = json.read_json(
            io.BytesIO(block),
            read_options=json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        ).combine_chunks()
        table.validate(full=True)
    except (pa.ArrowException, ValueError):
        raise NeedsRowwiseCheck from None
    # All lines begin with { and end with }. A line break between } and { separates objects, so as
    # many objects as lines means one object per line.
    if table.num_rows != block.count(b"\n"):
        raise NeedsRowwiseCheck
    (batch,) = table.select(schema.names).to_batches()
    lines = pa.array(np.arange(line, line + batch.num_rows))
    return pa.RecordBatch.from_arrays([*batch.columns, lines], names=[*schema.names, LINE])


def _has_object_per_line(block: bytes) -> bool:
    if not (block.startswith(b"{") and block.endswith(b"}\n")):
        return False
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    return bool((data[ends - 1] == ord("}")).all() and (data[ends[:-1] + 1] == ord("{")).all())


def _schema(block: bytes, used: Sequence[str]) -> Any:
    """Return the Arrow types of the used columns, by the values of the first row."""
    import pyarrow as pa

    first = next(json_lines(io.BytesIO(block)))
    types = {str: pa.string(), int: pa.int64()}
    fields = [(name, types.get(type(first.values.get(name)))) for name in used]
    if any(kind is None for _, kind in fields):
        raise NeedsRowwiseCheck
    return pa.schema(fields)


def _is_valid(batch: Any, task: Task) -> bool:
    """Apply the checks of ``RowValidator`` by column."""
    import pyarrow as pa
    from pyarrow import compute

    if any(column.null_count for column in batch.columns):
        return False
    for template in (task.input, task.target):
        columns = [batch.column(name) for name in template_fields(template)]
        if columns and all(column.type == pa.string() for column in columns):
            blank = [compute.equal(compute.utf8_trim_whitespace(c), "") for c in columns]
            if compute.any(reduce(compute.and_, blank)).as_py():
                return False
    if task.choices is not None and task.messages is None:
        column = batch.column(template_fields(task.target)[0]).cast(pa.string())
        return bool(compute.all(compute.is_in(column, pa.array(task.choices, pa.string()))).as_py())
    return True
