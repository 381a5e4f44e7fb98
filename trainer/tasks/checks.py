"""What a task asks of its rows, checked row by row. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import PLACEHOLDER, Task, template_fields
from trainer.errors import BadInput, did_you_mean
from trainer.tasks.files import Record, place, shorten
from trainer.tasks.nested import parsers, problem_of_tokens

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
        return {task.messages: "messages"}
    if task.tokens is not None:
        return {task.tokens.input_ids: "tokens.input_ids", task.tokens.labels: "tokens.labels"}
    used = dict.fromkeys(template_fields(task.input), "input")
    for name in template_fields(task.target):
        used.setdefault(name, "target")
    if task.metric == "execution":
        used.setdefault(task.tests, "tests")
    return used


def content_columns(task: Task) -> list[str]:
    """Columns that are read and learnt: rows that agree in them are the same row."""
    return [name for name, setting in columns_used(task).items() if setting != "tests"]


@dataclass
class Problems:
    """Problems of one file: all are counted, the first ones are kept."""

    path: str
    count: int = 0
    kept: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, text: str) -> None:
        self.count += 1
        if len(self.kept) < 4 * MOST_PROBLEMS:  # more than is shown: they are sorted at the end
            self.kept.append((row, text))

    def lines(self, most: int = MOST_PROBLEMS) -> list[str]:
        """The first ``most`` problems in the order of the file, and how many more there are."""
        shown = [text for _, text in sorted(self.kept, key=lambda item: item[0])][:most]
        more = self.count - len(shown)
        return [*shown, f"{self.path}: and {more} more"] if more else shown

    def raise_if_any(self) -> None:
        if self.count:
            raise BadInput(self.lines())


@dataclass
class _Column:
    """What was seen of one column: rows without it, and rows by kind of value."""

    missing: int = 0
    without: list[tuple[Record, list[str]]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[Record, Any]]] = field(default_factory=dict)


class RowCheck:
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
        self._columns = {name: _Column() for name in self._used}
        self._names: dict[str, None] = {}  # a set that keeps the order
        self._parsers = parsers(task)
        self._input, self._target = template_fields(task.input), template_fields(task.target)

    def feed(self, record: Record) -> None:
        self.rows += 1
        if record.problem:
            self._add(record, record.problem)
            return
        self._names.update(dict.fromkeys(record.values))
        good = {name for name in self._used if self._value_is_good(record, name)}
        for setting, names in (("input", self._input), ("target", self._target)):
            if names and good.issuperset(names):
                self._check_blank(record, setting, names)
        if self.task.scored_by_likelihood and good.issuperset(self._target):
            self._check_choice(record, self._target[0])
        if self.task.tokens is not None and good.issuperset(self._used):
            ids, labels = (self._parsers[name](record.values[name]) for name in self._used)
            problem = problem_of_tokens(ids, labels)
            if problem:
                self._add(record, problem)

    def finish(self, header: Sequence[str] | None = None) -> Problems:
        """All problems found. ``header`` gives the columns where the format has them apart."""
        if self.rows == 0:
            self.problems.add(0, f"{self.problems.path}: has no rows")
        names = list(header) if header is not None else list(self._names)
        for name, column in self._columns.items():
            self._report_missing(name, column, names)
            self._report_mixed(name, column)
        return self.problems

    def _add(self, record: Record, text: str) -> None:
        where = place(self.problems.path, record.row, record.line)
        self.problems.add(record.row, f"{where}: {text}")

    def _value_is_good(self, record: Record, name: str) -> bool:
        column = self._columns[name]
        if name not in record.values:
            column.missing += 1
            if len(column.without) < MOST_PROBLEMS:
                column.without.append((record, list(record.values)))
            return False
        value = record.values[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            what = "null" if value is None else "NaN, a missing number"
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
        column.kinds[kind] = column.kinds.get(kind, 0) + 1
        examples = column.examples.setdefault(kind, [])
        if len(examples) < MOST_PROBLEMS:
            examples.append((record, value))
        return True

    def _check_blank(self, record: Record, setting: str, names: list[str]) -> None:
        if any(str(record.values[name]).strip() for name in names):
            return
        what = " and ".join(names)
        verb = "is" if len(names) == 1 else "are"
        self._add(
            record,
            f"{what}: {verb} empty, so the {setting} says nothing; fill it or remove the row",
        )

    def _check_choice(self, record: Record, name: str) -> None:
        choices, value = self.task.choices or [], str(record.values[name])
        if value in choices:
            return
        known = ", ".join(map(repr, choices[:8])) + (", ..." if len(choices) > 8 else "")
        self._add(
            record,
            f"{name}: {shorten(value)} is not one of tasks.{self.task.name}.choices: {known}"
            f"{did_you_mean(value, choices)}",
        )

    def _report_missing(self, name: str, column: _Column, names: list[str]) -> None:
        if not column.missing and (self.rows or name in names):
            return
        setting = f"tasks.{self.task.name}.{self._used[name]}"
        if column.missing and name in self._names:  # other rows have it
            for record, has in column.without:
                self._add(record, _no_column(name, setting, has))
            self.problems.count += column.missing - len(column.without)
        elif names:
            self.problems.add(0, f"{self.problems.path}: {_no_column(name, setting, names)}")

    def _report_mixed(self, name: str, column: _Column) -> None:
        if len(column.kinds) < 2:
            return
        usual = max(column.kinds, key=lambda kind: column.kinds[kind])
        for kind, count in column.kinds.items():
            if kind == usual:
                continue
            for record, value in column.examples[kind]:
                remedy = "put it in quotes" if usual == "text" else f"make it {usual}"
                self._add(
                    record,
                    f"{name}: {shorten(value)} is {kind}, other rows have {usual}; {remedy}",
                )
            self.problems.count += count - len(column.examples[kind])


def kind_of(value: Any) -> str:
    """The kind of a value as messages name it."""
    return next((name for kind, name in _KINDS if isinstance(value, kind)), type(value).__name__)


def _no_column(name: str, setting: str, names: Sequence[str]) -> str:
    hint = did_you_mean(name, names)
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        hint = "; separate the fields with commas (.csv) or tabs (.tsv)"
    return f"no column {name!r}, which {setting} uses; columns: {', '.join(names) or 'none'}{hint}"


def merge(problems: Iterable[Problems]) -> list[str]:
    """Problems of several files as lines; each file keeps its share of the room."""
    broken = [found for found in problems if found.count]
    most = max(2, MOST_PROBLEMS // max(1, len(broken)))
    return [line for found in broken for line in found.lines(most)]
