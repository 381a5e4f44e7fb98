"""Check the rows of a task, and group their problems. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import DEFAULT_MASK, DEFAULT_TOOLS, PLACEHOLDER, Task, template_fields
from trainer.config.task import VIRTUAL_TOKENS
from trainer.data.column_parsers import parsers, problem_of_tokens, without_padding
from trainer.data.text_readers import FileRecord, place, shorten
from trainer.runtime.errors import did_you_mean

MAX_PROBLEMS = 10
_KINDS = {
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def render(template: str, row: Mapping[str, Any], hard_prompt: str = "") -> str:
    """Fill a template with ``str`` of a row's values; raises ``KeyError`` for a missing column.

    Unpaired braces are kept.

    Args:
        hard_prompt: text in place of ``{virtual_tokens}``.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] == VIRTUAL_TOKENS:
            return hard_prompt
        return str(row[match[1]]) if match[1] else match[0][0]

    return PLACEHOLDER.sub(value, template)


def label_texts(task: Task) -> list[str]:
    """Render every choice of a task as a target; empty without choices."""
    if task.choices is None:
        return []
    if task.messages is not None:
        return task.choices
    column = template_fields(task.target)[0]
    return [render(task.target, {column: choice}) for choice in task.choices]


def columns_used(task: Task) -> dict[str, str]:
    """Return the columns that a task uses, with the setting that names each."""
    if task.messages is not None:
        return {task.messages: "messages"} | dict.fromkeys(optional_columns(task), "tools")
    if task.tokens is not None:
        used = {task.tokens.input_ids: "tokens.input_ids", task.tokens.labels: "tokens.labels"}
        return used | dict.fromkeys(optional_columns(task), "tokens.attention_mask")
    used = dict.fromkeys(template_fields(task.input), "input")
    for name in template_fields(task.target):
        used.setdefault(name, "target")
    if task.metric == "execution":
        used.setdefault(task.tests, "tests")
    return used


def optional_columns(task: Task) -> list[str]:
    """Return the used columns that may be missing or null in a row."""
    name = None if task.messages is None else task.tools
    if task.tokens is not None:
        name = task.tokens.attention_mask
    return [] if name is None else [name]


def content_columns(task: Task) -> list[str]:
    """Return the columns that define a row's content: rows with equal values are equal."""
    return [name for name, setting in columns_used(task).items() if setting != "tests"]


@dataclass
class _Group:
    """Rows with the same problem: the first row, and the number of rows."""

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
    """Problems of one file and its rows; equal problems of rows are one group.

    Attributes:
        of_file: problems of the file, such as a missing column, without the file's name.
        unread: reasons that the file, or the rest of it, cannot be read, with the place.
        rows: number of rows with a problem.
    """

    path: str
    of_file: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    rows: int = 0
    _groups: dict[str, _Group] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.of_file or self.unread or self.rows)

    def add(self, row: int, where: str, text: str, rows: int = 1) -> None:
        """Count a problem of ``rows`` rows, the first of which is number ``row`` at ``where``."""
        self.rows += rows
        # Keep more groups than are shown, because they are sorted by row at the end.
        if text in self._groups or len(self._groups) < 4 * MAX_PROBLEMS:
            self._groups.setdefault(text, _Group(row, where, text)).rows += rows

    def row_lines(self, limit: int = MAX_PROBLEMS) -> list[str]:
        """Format the first ``limit`` groups in file order, and the number of other rows."""
        shown = sorted(self._groups.values(), key=lambda group: group.row)[:limit]
        more = self.rows - sum(group.rows for group in shown)
        return [*map(str, shown), *([f"{self.path}: and {more} more"] if more else [])]


@dataclass
class _Column:
    """Statistics of one column.

    Attributes:
        missing: rows without the column.
        without: columns of such rows -> (first row, number of rows).
        kinds: kind of value -> (first row, its value, number of rows).
    """

    missing: int = 0
    without: dict[tuple[str, ...], tuple[FileRecord, int]] = field(default_factory=dict)
    kinds: dict[str, tuple[FileRecord, Any, int]] = field(default_factory=dict)


class RowValidator:
    """Checks the rows of one file against one task: ``check`` every record, then ``finish``.

    A row is invalid if it is malformed; if a used column is missing, null, neither text nor number,
    or of another kind than in most rows (columns in ``optional`` may be missing or null); if all
    fields of the input or of the target are blank; if the label is not one of ``choices``; or if
    test calls, dialogue, token ids or labels are malformed.
    """

    def __init__(self, path: str, task: Task) -> None:
        self.task = task
        self.problems = Problems(path)
        self.num_rows = 0
        self._used = columns_used(task)
        self._optional = optional_columns(task)
        self._columns = {name: _Column() for name in self._used}
        self._names: dict[str, None] = {}  # an ordered set
        self._parsers = parsers(task)
        self._templates = [
            (setting, names)
            for setting in ("input", "target")
            if (names := template_fields(getattr(task, setting)))
        ]

    @property
    def names(self) -> list[str]:
        """All columns of the rows, in order of first appearance."""
        return list(self._names)

    def check(self, record: FileRecord) -> dict[str, Any] | None:
        """Check one row. Return its used columns, parsed, without nulls; None if invalid."""
        self.num_rows += 1
        if record.problem:
            self._add(record, record.problem)
            return None
        if not record.values.keys() <= self._names.keys():
            self._names.update(dict.fromkeys(record.values))
        row: dict[str, Any] = {}
        for name in self._used:
            self._check_value(record, name, row)
        for setting, names in self._templates:
            if row.keys() >= set(names) and not any(str(row[name]).strip() for name in names):
                verb = "is" if len(names) == 1 else "are"
                self._add(
                    record,
                    f"{' and '.join(names)}: {verb} empty, so the {setting} has no text; fill it "
                    "or remove the row",
                )
        if len(row) < len(self._used):
            return None
        if self.task.tokens is not None:
            self._remove_padding(record, row)
        return {name: value for name, value in row.items() if value is not None}

    def _remove_padding(self, record: FileRecord, row: dict[str, Any]) -> None:
        """Replace ids, labels and mask of a row by the ids and labels that are not padding."""
        ids, labels, *masks = self._used
        mask = next((row.pop(name) for name in masks), None)
        try:
            row[ids], row[labels] = without_padding(row[ids], row[labels], mask)
        except ValueError as error:
            self._add(record, str(error))
            return
        if problem := problem_of_tokens(row[ids], row[labels]):
            self._add(record, problem)

    def finish(self, header: Sequence[str] | None = None) -> Problems:
        """Return all problems. ``header``: the columns, if the format has a header."""
        if self.num_rows == 0:
            self.problems.of_file.append("has no rows")
        names = list(header) if header is not None else self.names
        for name, column in self._columns.items():
            self._report_missing(name, column, names)
            self._report_mixed(name, column)
        return self.problems

    def _add(self, record: FileRecord, text: str, rows: int = 1) -> None:
        where = place(self.problems.path, record.row, record.line)
        self.problems.add(record.row, where, text, rows)

    def _check_value(self, record: FileRecord, name: str, row: dict[str, Any]) -> None:
        """Check one value; if valid, put its parsed form into ``row``."""
        column = self._columns[name]
        value = record.values.get(name)
        if name in self.task.optional and (value is None or value != value):
            row[name] = ""
        elif name in self._optional and value is None:
            row[name] = None
        elif name not in record.values:
            column.missing += 1
            has = tuple(record.values)
            if has in column.without or len(column.without) < MAX_PROBLEMS:
                first, rows = column.without.get(has, (record, 0))
                column.without[has] = (first, rows + 1)
        elif value is None or (isinstance(value, float) and not math.isfinite(value)):
            what = "null" if value is None else "infinite"
            what = "NaN, a missing number" if isinstance(value, float) and value != value else what
            self._add(record, f"{name}: is {what}; give it a value or remove the row")
        elif name in self._parsers:
            try:
                row[name] = self._parsers[name](value)
            except ValueError as error:
                self._add(record, f"{name}: {error}")
        elif (kind := _KINDS[type(value)]) in ("a list", "an object"):
            self._add(
                record, f"{name}: is {kind}, {shorten(value)}; a template takes text or a number"
            )
        else:
            first, example, rows = column.kinds.get(kind, (record, value, 0))
            column.kinds[kind] = (first, example, rows + 1)
            row[name] = value

    def _report_missing(self, name: str, column: _Column, names: list[str]) -> None:
        if name in self._optional:  # a column with the default name may be missing in all rows
            if name in names or name in (DEFAULT_TOOLS, DEFAULT_MASK):
                return
        elif not column.missing and (self.num_rows or name in names):
            return
        setting = f"tasks.{self.task.name}.{self._used[name]}"
        if column.missing and name in self._names:  # other rows have it
            counted = 0
            for has, (record, rows) in column.without.items():
                self._add(record, _no_column(name, setting, has), rows)
                counted += rows
            self.problems.rows += column.missing - counted
        elif names or column.missing:
            self.problems.of_file.append(_no_column(name, setting, names))

    def _report_mixed(self, name: str, column: _Column) -> None:
        if len(column.kinds) < 2:
            return
        usual = max(column.kinds, key=lambda kind: column.kinds[kind][2])
        remedy = "put it in quotes" if usual == "text" else f"make it {usual}"
        for kind, (record, value, rows) in column.kinds.items():
            if kind != usual:
                what = f"{shorten(value)} is {kind}, other rows have {usual}; {remedy}"
                self._add(record, f"{name}: {what}", rows)


def _no_column(name: str, setting: str, names: Sequence[str]) -> str:
    hint = did_you_mean(name, names)
    return f"no column {name!r}, which {setting} uses; columns: {', '.join(names) or 'none'}{hint}"


def merge_problems(problems: Iterable[Problems]) -> list[str]:
    """Format the problems of several files.

    Problems of files are first, because they may cause others; equal ones are one line. The rows of
    each file get an equal share of ``MAX_PROBLEMS`` lines, but at least two.
    """
    by_file = [of_file for of_file in problems if of_file]
    paths: dict[str, dict[str, None]] = {}
    for file in by_file:
        for text in file.of_file:
            paths.setdefault(text, {})[file.path] = None
    lines = []
    for text, names in paths.items():
        more = len(names) - 1
        others = f" and {more} more file{'s' if more > 1 else ''}" if more else ""
        lines.append(f"{next(iter(names))}{others}: {text}")
    limit = max(2, MAX_PROBLEMS // max(1, len(by_file)))
    lines += [line for file in by_file for line in file.unread]
    return lines + [line for file in by_file for line in file.row_lines(limit)]
