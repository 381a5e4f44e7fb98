"""One file or table -> checked rows as memory-mapped Arrow, with a hash of each. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.config import Task, template_fields
from trainer.data.arrow_reader import LINE, NeedsRowwiseCheck, plain_batches
from trainer.data.column_parsers import content_text, kept_nulls, parsers
from trainer.data.data_files import DataFile
from trainer.data.disk_arrays import DiskArrays, write_table
from trainer.data.row_validation import Problems, RowValidator, columns_used, content_columns
from trainer.data.text_readers import place
from trainer.runtime.errors import BadInput

#: Called with the name of a file and the number of its rows read, a few times per second.
OnRows = Callable[[str, int], None]

_INT64 = range(-(2**63), 2**63)
_BATCH = 1 << 12
_ARROW_TYPES = {str: "string", bool: "bool", int: "int64", float: "float64"}


@dataclass(frozen=True)
class IngestedFile:
    """Checked rows of one file.

    Attributes:
        name: the file, as messages name it.
        columns: all its columns.
        digest: SHA-256 of its bytes, in hex.
        hashes: 64 bits of the content of each row, memory-mapped.
        batches: the used columns, memory-mapped.
        as_json: columns that are kept as JSON text.
    """

    name: str
    columns: list[str]
    digest: str
    hashes: NDArray[np.uint64]
    batches: list[Any]
    as_json: frozenset[str]

    def __len__(self) -> int:
        return len(self.hashes)

    def values(self, batch: Any) -> Iterator[dict[str, Any]]:
        """Rows of a batch as the file has them, without columns that a row lacks."""
        names = [name for name in batch.schema.names if name != LINE]
        columns = [batch.column(name).to_pylist() for name in names]
        for values in zip(*columns, strict=True):
            row = dict(zip(names, values, strict=True))
            for name in self.as_json & row.keys():
                row[name] = json.loads(row[name])
            yield {name: value for name, value in row.items() if value is not None}

    def where(self, batch: Any, index: int, row: int) -> str:
        """Place of row ``row`` of the file, which is row ``index`` of the batch."""
        lines = batch.column(LINE) if LINE in batch.schema.names else None
        return place(self.name, row + 1, None if lines is None else lines[index].as_py())


def read_part(
    origin: DataFile, task: Task, *, on_rows: OnRows | None = None
) -> tuple[Problems, IngestedFile | None]:
    """Read and check one file or table: what is wrong with its rows; the rows if nothing is."""
    try:
        try:
            return Problems(origin.name), _plain(origin, task, on_rows)
        except NeedsRowwiseCheck:
            return _any(origin, task, on_rows)
    except BadInput as error:  # the file cannot be read as a whole
        return Problems(origin.name, unread=error.problems), None


def _plain(origin: DataFile, task: Task, on_rows: OnRows | None) -> IngestedFile:
    batches = plain_batches(origin, task)
    first = next(batches)
    columns = origin.header() or _columns_of_first_row(origin, task)
    hashes = DiskArrays("uint64")

    def counted() -> Iterator[Any]:
        rows = 0
        for batch in chain([first], batches):
            hashes.add(_hashes(batch, content_columns(task)))
            rows += batch.num_rows
            if on_rows is not None:
                on_rows(origin.name, rows)
            yield batch

    stored = write_table(first.schema, counted())
    return IngestedFile(origin.name, columns, origin.digest(), hashes.array(), stored, frozenset())


def _columns_of_first_row(origin: DataFile, task: Task) -> list[str]:
    return list(next(iter(origin.records(list(columns_used(task))))).values)


def _hashes(batch: Any, columns: list[str]) -> NDArray[np.uint64]:
    values = [map(str, batch.column(name).to_pylist()) for name in columns]
    texts = ("\0".join(row).encode() for row in zip(*values, strict=True))
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, batch.num_rows)


def _any(
    origin: DataFile, task: Task, on_rows: OnRows | None
) -> tuple[Problems, IngestedFile | None]:
    """Row by row: every mistake gets its line, every value is kept exactly."""
    check = RowValidator(origin.name, task)
    used = list(columns_used(task))
    parse = parsers(task)
    types: dict[str, set[type]] = {name: set() for name in used if name not in parse}
    columns: dict[str, None] = {}
    has_lines = False
    header = None
    try:
        header = origin.header()
        for record in origin.records(used, kept_nulls(task)):
            check.feed(record)
            columns.update(dict.fromkeys(record.values))
            has_lines = record.line is not None
            for name in types.keys() & record.values.keys():
                types[name].add(_type_of(record.values[name]))
            if on_rows is not None and check.rows % _BATCH == 0:
                on_rows(origin.name, check.rows)
    except BadInput as error:  # the rest of the file cannot be read
        check.problems.unread += error.problems
        return check.problems, None
    problems = check.finish(header)
    if problems:
        problems.whole += _problem_of_classes(origin, task)
        return problems, None
    kinds = {name: _arrow_type(found) for name, found in types.items()}
    kinds |= {name: _nested_type(name, task) for name in parse}
    as_json = frozenset(name for name, kind in kinds.items() if kind is None)
    hashes = DiskArrays("uint64")
    batches = _batches(origin, task, kinds, has_lines, hashes)
    stored = write_table(_schema(kinds, has_lines), batches)
    names = header or list(columns)
    return problems, IngestedFile(
        origin.name, names, origin.digest(), hashes.array(), stored, as_json
    )


def _problem_of_classes(origin: DataFile, task: Task) -> list[str]:
    """Choices that are class numbers, where the rows have the names of the classes."""
    column = template_fields(task.target)[0] if task.choices else ""
    names = origin.class_names(column)
    wrong = [choice for choice in task.choices or [] if names and choice not in names]
    return [
        f"{column}: its values are the names of its classes ({', '.join(names or [])}); "
        f"tasks.{task.name}.choices has {choice!r}: list the names"
        for choice in wrong[:1]
    ]


def _type_of(value: Any) -> type:
    """The type that a value needs in Arrow; ``object`` for what is kept as JSON text."""
    if type(value) is int and value not in _INT64:
        return object
    return type(value) if type(value) in _ARROW_TYPES else object


def _arrow_type(kinds: set[type]) -> str | None:
    """Arrow type of a column, or None: mixed and nested values are kept as JSON text, exactly."""
    return _ARROW_TYPES.get(next(iter(kinds))) if len(kinds) == 1 else None


def _nested_type(name: str, task: Task) -> str | None:
    if task.tokens is not None:
        return "list<int32>"
    return "string" if task.choices is not None and name != task.tests else None


def _schema(kinds: dict[str, str | None], has_lines: bool) -> Any:
    import pyarrow as pa

    types = {"list<int32>": pa.list_(pa.int32()), None: pa.string()}
    fields = [(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in kinds.items()]
    return pa.schema([*fields, (LINE, pa.int64())] if has_lines else fields)


def _batches(
    origin: DataFile,
    task: Task,
    kinds: dict[str, str | None],
    has_lines: bool,
    hashes: DiskArrays,
) -> Iterator[Any]:
    """Checked rows once more, as record batches."""
    import pyarrow as pa

    schema, parse, content = _schema(kinds, has_lines), parsers(task), content_columns(task)
    rows: list[dict[str, Any]] = []
    found: list[int] = []

    def batch() -> Any:
        hashes.add(np.array(found, np.uint64))
        arrays = [pa.array([row[f.name] for row in rows], f.type) for f in schema]
        rows.clear()
        found.clear()
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    for record in origin.records(list(kinds), kept_nulls(task)):
        row = {name: record.values.get(name) for name in kinds}  # a column may be optional
        row |= {name: parser(row[name]) for name, parser in parse.items()}
        found.append(xxhash.xxh3_64_intdigest(content_text(row, content).encode()))
        for name, kind in kinds.items():
            if kind is None:
                row[name] = json.dumps(row[name])
        rows.append({**row, LINE: record.line})
        if len(rows) == _BATCH:
            yield batch()
    if rows:
        yield batch()
