"""Rows of a task: a file, checked and held as memory-mapped Arrow. Imports no torch.

``check_rows`` is the preflight: it reads every file of a run once and says everything that is
wrong, before a process group or a model is started. ``load_rows`` checks the same and keeps the
columns that the task uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, Task
from trainer.errors import BadInput
from trainer.tasks.checks import (
    Problems,
    RowCheck,
    columns_used,
    fields,
    merge,
    parse_tests,
    render,
)
from trainer.tasks.files import columns_of, locate, place, read_records

__all__ = [
    "SPLITS",
    "Rows",
    "Source",
    "check_rows",
    "fields",
    "gold_target",
    "load_rows",
    "load_splits",
    "render",
]

SPLITS = ("train", "validation", "shifted_validation")
_INT64 = range(-(2**63), 2**63)
_BATCH = 1000
_ARROW_TYPES = {str: "string", bool: "bool", int: "int64", float: "float64"}


@dataclass(frozen=True)
class Source:
    """A range of rows that are mixed with others by weight: ``rows[start:stop]``.

    Without weights (``None`` for all sources of a split, never for some) an epoch reads every row
    once, in one shuffled order, as if there were one source.

    With weights an epoch still reads N rows, as many as the split has. Source s gives n_s of them,
    N * weight_s / sum of weights, rounded by largest remainder (ties: the earlier source), so that
    the n_s sum to N. Each source is read in passes of its own: pass k is its rows in an order that
    is a pure function of (seed, s, k), and the passes are laid end to end. Epoch e takes the places
    e * n_s to (e + 1) * n_s of that endless sequence, and shuffles the rows of all sources together
    by (seed, e). So the shares are exact in every epoch, no row of a source is read again before
    all others of that source were, and an epoch is a pure function of (seed, epoch). Small sources
    with large weights are repeated within an epoch, large ones with small weights take several
    epochs to be read once; with weights in proportion to their rows every row is read once.
    (T5's mixing by rate, arXiv 1910.10683 section 3.5.2, with exact shares in place of draws.)

    Attributes:
        start, stop: rows of the split; sources are in order and without gaps.
        weight: positive, or None.
    """

    start: int
    stop: int
    weight: float | None = None


class Rows:
    """Checked rows of one file. ``rows[i]`` holds the columns that the task uses.

    Values are those of the file: nothing is guessed from text that looks like a date or a number.
    The column of test calls (metric ``execution``) is a list also where the file has JSON text.

    Attributes:
        path: the file.
        columns: all its columns.
        digest: SHA-256 of its bytes, in hex.
        sources: ranges of rows that are mixed by weight.
    """

    def __init__(
        self, path: str, columns: list[str], digest: str, table: Any, as_json: set[str], lines: Any
    ) -> None:
        self.path = path
        self.columns = columns
        self.digest = digest
        self._table = table
        self._as_json = as_json
        self._lines = lines
        self.sources = (Source(0, len(table)),)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        row: dict[str, Any] = self._table[index]
        return {k: json.loads(v) if k in self._as_json else v for k, v in row.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _BATCH):
            batch = self._table[start : start + _BATCH]
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                yield {k: json.loads(v) if k in self._as_json else v for k, v in row.items()}

    def where(self, index: int) -> str:
        """``FILE:LINE`` of a row in jsonl, else ``FILE: row N``; both count from 1."""
        line = self._lines[index] if self._lines else None
        return place(self.path, index + 1, line)


def load_rows(path: str, task: Task) -> Rows:
    """Read and check one file of a task.

    Args:
        path: jsonl, json, csv, tsv or parquet file.
        task: its templates, choices and metric say what a row needs.

    Raises:
        BadInput: with every problem, at most ten and how many more there are.
    """
    file = locate(path, _setting(path, task))
    problems, columns, lines, types = _scan(file, task)
    problems.raise_if_any()
    if task.metric == "execution":
        types[task.tests] = {object}
    as_json = {name for name, kinds in types.items() if _arrow_type(kinds) is None}
    table = _store(file, types, task.tests if task.metric == "execution" else None)
    return Rows(str(file), columns, _digest(file), table, as_json, lines)


def load_splits(task: Task) -> dict[str, Rows]:
    """All rows of a task: ``train``, and ``validation`` and ``shifted_validation`` if it has any.

    Raises:
        BadInput: with every problem of all files.
    """
    paths = {split: getattr(task, split) for split in SPLITS}
    return {split: load_rows(path, task) for split, path in paths.items() if path is not None}


def check_rows(config: RunConfig) -> None:
    """Check every file of every task, without loading it.

    Raises:
        BadInput: with the problems of all files.
    """
    unreadable: list[str] = []
    found: list[Problems] = []
    for task in config.tasks:
        for split in SPLITS:
            path = getattr(task, split)
            if path is None:
                continue
            try:
                file = locate(path, f"tasks.{task.name}.{split}")
                found.append(_scan(file, task)[0])
            except BadInput as error:
                unreadable += error.problems
    problems = unreadable + merge(found)
    if problems:
        raise BadInput(problems)


def gold_target(row: dict[str, Any], task: Task) -> str:
    """The value of a row that ``task.choices`` lists: the target's one column, as text."""
    return str(row[fields(task.target)[0]])


def _setting(path: str, task: Task) -> str:
    split = next((split for split in SPLITS if getattr(task, split) == path), None)
    return f"tasks.{task.name}" + (f".{split}" if split else "")


def _scan(file: Path, task: Task) -> tuple[Problems, list[str], Any, dict[str, set[type]]]:
    """One pass over a file: (problems, its columns, lines of the rows, types of used columns)."""
    check = RowCheck(str(file), task)
    used = columns_used(task)
    types: dict[str, set[type]] = {name: set() for name in used}
    lines, columns = array("q"), dict[str, None]()
    header: list[str] | None = None
    try:
        header = columns_of(file)
        for record in read_records(file, list(used)):
            check.feed(record)
            columns.update(dict.fromkeys(record.values))
            if record.line is not None:
                lines.append(record.line)
            for name in used.keys() & record.values.keys():
                types[name].add(_type_of(record.values[name]))
    except BadInput as error:  # the rest of the file cannot be read
        for text in error.problems:
            check.problems.add(check.rows + 1, text)
        return check.problems, [], lines, types
    return check.finish(header), header or list(columns), lines, types


def _type_of(value: Any) -> type:
    """The type that a value needs in Arrow; ``object`` for what is kept as JSON text."""
    if type(value) is int and value not in _INT64:
        return object
    return type(value) if type(value) in _ARROW_TYPES else object


def _arrow_type(kinds: set[type]) -> str | None:
    """Arrow type of a column, or None: mixed and nested values are kept as JSON text, exactly."""
    return _ARROW_TYPES.get(next(iter(kinds))) if len(kinds) == 1 else None


def _store(file: Path, types: dict[str, set[type]], tests: str | None) -> Any:
    """The used columns of a checked file as a memory-mapped ``datasets.Dataset``.

    The Arrow file is written to the temporary folder and unlinked as soon as it is mapped, so
    there is no cache to grow old and nothing for two ranks to write at once. Where the folder is
    full or cannot be written, the rows stay in memory.
    """
    import datasets
    import pyarrow

    kinds = {name: _arrow_type(found) for name, found in types.items()}
    features = datasets.Features(
        {name: datasets.Value(kind or "string") for name, kind in kinds.items()}
    )
    as_json = {name for name, kind in kinds.items() if kind is None}
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
        arrow = f"{folder}/rows.arrow"
        with pyarrow.OSFile(arrow, "wb") as stream:
            _write(file, features, as_json, tests, stream)
        return datasets.Dataset.from_file(arrow)
    buffer = pyarrow.BufferOutputStream()
    _write(file, features, as_json, tests, buffer)
    return datasets.Dataset.from_buffer(buffer.getvalue())


def _write(file: Path, features: Any, as_json: set[str], tests: str | None, stream: Any) -> None:
    from datasets.arrow_writer import ArrowWriter

    writer = ArrowWriter(stream=stream, features=features)
    batch: dict[str, list[Any]] = {name: [] for name in features}
    for record in read_records(file, list(features)):
        for name, values in batch.items():
            value = record.values[name]
            value = parse_tests(value) if name == tests else value
            values.append(_as_json_text(value) if name in as_json else value)
        if len(next(iter(batch.values()))) >= _BATCH:
            writer.write_batch(batch)
            batch = {name: [] for name in features}
    if next(iter(batch.values())):
        writer.write_batch(batch)
    writer.finalize()


def _as_json_text(value: Any) -> str:
    return json.dumps(value, default=str)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
