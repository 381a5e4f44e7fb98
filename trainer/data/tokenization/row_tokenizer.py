"""Base class of row tokenizers, and the outcome of tokenizing rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import Task
from trainer.data.row_validation import MAX_PROBLEMS
from trainer.data.token_table import Example, TokenBlock

#: Fields of a ``TokenizationReport`` that are stored with a cached table.
COUNTS = (
    "skipped",
    "truncated",
    "merged",
    "first_merged",
    "omitting",
    "first_omitting",
    "branched",
)


@dataclass
class TokenizationReport:
    """Outcome of tokenizing a batch of rows, or all rows.

    Attributes:
        skipped, truncated: number of rows that are too long, by ``task.too_long``.
        merged: number of rows whose input and target the tokenizer merges.
        omitting: number of dialogues in which the chat template omits a part of an answer.
        first_merged, first_omitting: the first of these rows; -1 if there is none.
        branched: number of dialogues whose earlier turns the chat template rewrites.
        invalid: number of rows with a problem.
        problems: problem -> (first row, number of rows), for the first few problems.
    """

    rows: int = 0
    skipped: int = 0
    truncated: int = 0
    merged: int = 0
    first_merged: int = -1
    omitting: int = 0
    first_omitting: int = -1
    branched: int = 0
    invalid: int = 0
    problems: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_merged(self, row: int) -> None:
        self.merged += 1
        self.first_merged = _first(self.first_merged, row)

    def add_omitting(self, row: int) -> None:
        self.omitting += 1
        self.first_omitting = _first(self.first_omitting, row)

    def add_problem(self, row: int, text: str, rows: int = 1) -> None:
        """Count a problem of ``rows`` rows, the first of which is number ``row``."""
        self.invalid += rows
        if text in self.problems or len(self.problems) < MAX_PROBLEMS:
            first, before = self.problems.get(text, (row, 0))
            self.problems[text] = (first, before + rows)

    def add(self, other: TokenizationReport) -> None:
        """Add the outcome of the rows that follow."""
        self.rows += other.rows
        self.skipped += other.skipped
        self.truncated += other.truncated
        self.merged += other.merged
        self.omitting += other.omitting
        self.branched += other.branched
        self.first_merged = _first(self.first_merged, other.first_merged)
        self.first_omitting = _first(self.first_omitting, other.first_omitting)
        invalid = self.invalid + other.invalid
        for text, (row, rows) in other.problems.items():
            self.add_problem(row, text, rows)
        self.invalid = invalid


def _first(row: int, later: int) -> int:
    """Return the first of two rows; -1 stands for no row."""
    return later if row < 0 else row


class RowTokenizer(ABC):
    """Converts rows to examples; pickled and sent to workers.

    Args:
        max_length: maximum tokens of a row: the context minus the virtual tokens.

    Attributes:
        limit: reason for ``max_length``, for messages.
        prefix, choices: hard prompt before every input; candidate targets of every row.
        position: ``Prompt.placement``.
    """

    limit = "(context minus virtual tokens)"
    prefix = ""
    position = "front"
    choices: Sequence[str] | None = None

    def __init__(self, task: Task, max_length: int) -> None:
        self.task, self.max_length = task, max_length

    def __call__(
        self, first: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[TokenBlock, TokenizationReport]:
        """Tokenize consecutive rows, of which the first has index ``first``."""
        report, examples = TokenizationReport(len(rows)), list[Example]()
        for row, values in enumerate(self.prepare(rows), start=first):
            examples += self.examples(row, values, report)
        return TokenBlock.of(examples), report

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """Process a batch of rows together, before ``examples``."""
        return rows

    @abstractmethod
    def examples(self, row: int, values: Any, report: TokenizationReport) -> list[Example]:
        """Return the examples of one prepared row; none if it is skipped or has a problem."""

    def may_truncate(self, row: int, num_tokens: int, report: TokenizationReport) -> bool:
        """Whether to truncate a row that is too long; otherwise count it as skipped or refused."""
        if self.task.too_long == "skip":
            report.skipped += 1
        elif self.task.too_long == "refuse":
            report.add_problem(
                row,
                f"has {num_tokens} tokens, {self.max_length} fit {self.limit}; shorten it, or set "
                f"tasks.{self.task.name}.too_long to skip or truncate",
            )
        return self.task.too_long == "truncate"


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of leading elements that are equal."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # compares slices: faster than elements one by one
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def problem_of_choices(task: Task, targets: list[list[int]]) -> str | None:
    """Describe choices with equal tokens, or without tokens; None if there are none."""
    assert task.choices is not None
    first: dict[tuple[int, ...], str] = {}
    for choice, target in zip(task.choices, targets, strict=True):
        if not target:
            return f"{choice!r} gives no tokens with this tokenizer"
        other = first.setdefault(tuple(target), choice)
        if other != choice:
            return (
                f"{other!r} and {choice!r} give the same tokens: this base cannot tell them apart"
            )
    return None
