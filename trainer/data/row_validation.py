"""What a task asks of its rows, checked row by row. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import DEFAULT_TOOLS, PLACEHOLDER, Task, template_fields
from trainer.data.column_parsers import parsers, problem_of_tokens
from trainer.data.text_readers import FileRecord, place, shorten
from trainer.runtime.errors import did_you_mean

MOST_PROBLEMS = 10
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a truth value"),
    ((int, float), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "an object"),
    ((bytes, bytearray), "binary data"),
)


def render(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template with a row's values, as ``str`` writes them. Lone braces stay as they are.

    Raises:
        KeyError: the row lacks a column.
    """

    def value(match: re.Match[str]) -> str:
        return str(row[match[1]]) if match[1] else match[0][0]

    return PLACEHOLDER.sub(value, template)


def label_texts(task: Task) -> list[str]:
    """Every choice of a task as a target; none where it has no choices."""
    if task.choices is None:
        return []
    column = template_fields(task.target)[0]
    return [render(task.target, {column: choice}) for choice in task.choices]


def columns_used(task: Task) -> dict[str, str]:
    """Columns that a task reads, each with the setting that names it."""
    if task.messages is not None:
        return {task.messages: "messages"} | dict.fromkeys(optional_columns(task), "tools")
    if task.tokens is not None:
        return {task.tokens.input_ids: "tokens.input_ids", task.tokens.labels: "tokens.labels"}
    used = dict.fromkeys(template_fields(task.input), "input")
    for name in template_fields(task.target):
        used.setdefault(name, "target")
    if task.metric == "execution":
        used.setdefault(task.tests, "tests")
    return used


def optional_columns(task: Task) -> list[str]:
    """Those of ``columns_used`` that rows may lack, or hold null in."""
    return [task.tools] if task.messages is not None and task.tools is not None else []


def content_columns(task: Task) -> list[str]:
    """Columns that are read and learnt: rows that agree in them are the same row."""
    return [name for name, setting in columns_used(task).items() if setting != "tests"]


@dataclass
class _Group:
    """Rows with the same problem: the first one, and how many there are."""

    row: int
    where: str
    text: str
    rows: int = 0

    def __str__(self) -> str:
        more = self.rows - 1
        others = f" and {more} more row{'s' if more > 1 else ''}" if more else ""
        return f"{self.where}{others}: {self.text}"


@dataclass
class Problems:
    """Problems of one file: of the whole file, and of its rows, where equal ones are one group.

    Attributes:
        whole: problems of the file, as a column that it lacks, without its name.
        unread: why it, or the rest of it, cannot be read, with the place.
        rows: how many rows have a problem, by problem.
    """

    path: str
    whole: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    rows: int = 0
    _groups: dict[str, _Group] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.whole or self.unread or self.rows)

    def add(self, row: int, where: str, text: str, rows: int = 1) -> None:
        """Count a problem of ``rows`` rows, the first of which is number ``row`` at ``where``."""
        self.rows += rows
        # More groups than are shown are kept: they are sorted at the end.
        if text in self._groups or len(self._groups) < 4 * MOST_PROBLEMS:
            self._groups.setdefault(text, _Group(row, where, text)).rows += rows

    def row_lines(self, most: int = MOST_PROBLEMS) -> list[str]:
        """The first ``most`` groups in the order of the file, and how many rows are left."""
        shown = sorted(self._groups.values(), key=lambda group: group.row)[:most]
        more = self.rows - sum(group.rows for group in shown)
        return [*map(str, shown), *([f"{self.path}: and {more} more"] if more else [])]


@dataclass
class _Column:
    """What was seen of one column: rows without it, and rows by kind of value.

    Attributes:
        without: by the columns that such rows have instead; the first row, and how many.
        kinds: of each kind of value the first row, its value, and how many rows.
    """

    missing: int = 0
    without: dict[tuple[str, ...], tuple[FileRecord, int]] = field(default_factory=dict)
    kinds: dict[str, tuple[FileRecord, Any, int]] = field(default_factory=dict)


class RowValidator:
    """Checks the rows of one file against one task; feed every record, then ``finish``.

    A row is wrong if it is broken, or if a column that the task uses is missing, null, not a text
    or number, or of another kind than in the other rows; if all fields of the input or of the
    target are blank (the rendered text never is: templates hold words of their own); if its label
    is none of ``choices``; if its test calls, dialogue, token ids or labels are malformed.
    """

    def __init__(self, path: str, task: Task) -> None:
        self.task = task
        self.problems = Problems(path)
        self.rows = 0
        self._used = columns_used(task)
        self._optional = optional_columns(task)
        self._columns = {name: _Column() for name in self._used}
        self._names: dict[str, None] = {}  # a set that keeps the order
        self._parsers = parsers(task)
        self._input, self._target = template_fields(task.input), template_fields(task.target)

    def feed(self, record: FileRecord) -> None:
        self.rows += 1
        if record.problem:
            self._add(record, record.problem)
            return
        self._names.update(dict.fromkeys(record.values))
        good = {name for name in self._used if self._value_is_good(record, name)}
        for setting, names in (("input", self._input), ("target", self._target)):
            if names and good.issuperset(names):
                self._check_blank(record, setting, names)
        if self.task.tokens is not None and good.issuperset(self._used):
            ids, labels = (self._parsers[name](record.values[name]) for name in self._used)
            problem = problem_of_tokens(ids, labels)
            if problem:
                self._add(record, problem)

    def finish(self, header: Sequence[str] | None = None) -> Problems:
        """All problems found. ``header`` gives the columns where the format has them apart."""
        if self.rows == 0:
            self.problems.whole.append("has no rows")
        names = list(header) if header is not None else list(self._names)
        for name, column in self._columns.items():
            self._report_missing(name, column, names)
            self._report_mixed(name, column)
        return self.problems

    def _add(self, record: FileRecord, text: str, rows: int = 1) -> None:
        where = place(self.problems.path, record.row, record.line)
        self.problems.add(record.row, where, text, rows)

    def _value_is_good(self, record: FileRecord, name: str) -> bool:
        column = self._columns[name]
        if name in self._optional and record.values.get(name) is None:
            return True
        if name not in record.values:
            column.missing += 1
            has = tuple(record.values)
            if has in column.without or len(column.without) < MOST_PROBLEMS:
                first, rows = column.without.get(has, (record, 0))
                column.without[has] = (first, rows + 1)
            return False
        value = record.values[name]
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            what = "null" if value is None else "infinite"
            what = "NaN, a missing number" if isinstance(value, float) and value != value else what
            self._add(record, f"{name}: is {what}; give it a value or remove the row")
            return False
        if name in self._parsers:
            try:
                self._parsers[name](value)
            except ValueError as error:
                self._add(record, f"{name}: {error}")
                return False
            return True
        kind = kind_of(value)
        if kind in ("a list", "an object", "binary data"):
            self._add(
                record, f"{name}: is {kind}, {shorten(value)}; a template takes text or a number"
            )
            return False
        first, example, rows = column.kinds.get(kind, (record, value, 0))
        column.kinds[kind] = (first, example, rows + 1)
        return True

    def _check_blank(self, record: FileRecord, setting: str, names: list[str]) -> None:
        if any(str(record.values[name]).strip() for name in names):
            return
        what = " and ".join(names)
        verb = "is" if len(names) == 1 else "are"
        self._add(
            record,
            f"{what}: {verb} empty, so the {setting} says nothing; fill it or remove the row",
        )

    def _report_missing(self, name: str, column: _Column, names: list[str]) -> None:
        if name in self._optional:  # the default name stands for "where rows have it"
            if name in names or name == DEFAULT_TOOLS:
                return
        elif not column.missing and (self.rows or name in names):
            return
        setting = f"tasks.{self.task.name}.{self._used[name]}"
        if column.missing and name in self._names:  # other rows have it
            counted = 0
            for has, (record, rows) in column.without.items():
                self._add(record, _no_column(name, setting, has), rows)
                counted += rows
            self.problems.rows += column.missing - counted
        elif names:
            self.problems.whole.append(_no_column(name, setting, names))

    def _report_mixed(self, name: str, column: _Column) -> None:
        if len(column.kinds) < 2:
            return
        usual = max(column.kinds, key=lambda kind: column.kinds[kind][2])
        remedy = "put it in quotes" if usual == "text" else f"make it {usual}"
        for kind, (record, value, rows) in column.kinds.items():
            if kind != usual:
                what = f"{shorten(value)} is {kind}, other rows have {usual}; {remedy}"
                self._add(record, f"{name}: {what}", rows)


def kind_of(value: Any) -> str:
    """The kind of a value as messages name it."""
    return next((name for kind, name in _KINDS if isinstance(value, kind)), type(value).__name__)


def _no_column(name: str, setting: str, names: Sequence[str]) -> str:
    hint = did_you_mean(name, names)
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        hint = "; separate the fields with commas (.csv) or tabs (.tsv)"
    return f"no column {name!r}, which {setting} uses; columns: {', '.join(names) or 'none'}{hint}"


def merge(problems: Iterable[Problems]) -> list[str]:
    """Problems of several files as lines.

    Those of whole files come first, as they explain others; equal ones of several files are one
    line. Each file keeps its share of the room for its rows.
    """
    broken = [found for found in problems if found]
    files: dict[str, dict[str, None]] = {}
    for found in broken:
        for text in found.whole:
            files.setdefault(text, {})[found.path] = None
    lines = []
    for text, paths in files.items():
        more = len(paths) - 1
        others = f" and {more} more file{'s' if more > 1 else ''}" if more else ""
        lines.append(f"{next(iter(paths))}{others}: {text}")
    most = max(2, MOST_PROBLEMS // max(1, len(broken)))
    lines += [line for found in broken for line in found.unread]
    return lines + [line for found in broken for line in found.row_lines(most)]
