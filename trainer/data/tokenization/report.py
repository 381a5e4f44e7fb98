"""Outcome of tokenizing rows, and the interface of row tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.config import Task
from trainer.data.row_validation import MAX_PROBLEMS
from trainer.data.token_table import TokenBlock

#: ``RowTokenizer.limit`` of rows that follow virtual tokens.
CONTEXT_LIMIT = "(context minus virtual tokens)"
#: Numbers of a ``TokenizationReport`` that are kept beside a cached table.
COUNTS = ("skipped", "truncated", "merged", "first_merged")


@dataclass
class TokenizationReport:
    """Outcome of tokenizing a batch of rows, or all rows.

    Attributes:
        skipped, truncated: rows that are too long, by ``task.too_long``.
        merged: rows whose input and target the tokenizer merges.
        first_merged: the first of them; -1 if there is none.
        invalid: rows with a problem.
        problems: problem -> the first such row, and how many; limited to the first few problems.
    """

    rows: int = 0
    skipped: int = 0
    truncated: int = 0
    merged: int = 0
    first_merged: int = -1
    invalid: int = 0
    problems: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_merged(self, row: int) -> None:
        """Count a row whose input and target the tokenizer merges."""
        self.merged += 1
        self.first_merged = row if self.first_merged < 0 else self.first_merged

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
        self.first_merged = other.first_merged if self.first_merged < 0 else self.first_merged
        invalid = self.invalid + other.invalid
        for text, (row, rows) in other.problems.items():
            self.add_problem(row, text, rows)
        self.invalid = invalid


class RowTokenizer(Protocol):
    """Makes examples of a batch of rows; it is pickled and sent to worker processes.

    Attributes:
        max_length: most tokens of a row.
        limit: reason for that limit, for messages.
    """

    task: Task
    max_length: int
    limit: str

    def __call__(
        self, first: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[TokenBlock, TokenizationReport]:
        """Tokenize consecutive rows, the first of which has the number ``first``."""
        ...


def too_long(num_tokens: int, tokenizer: RowTokenizer) -> str:
    """Describe a row that is too long and may be neither skipped nor truncated."""
    return (
        f"has {num_tokens} tokens, {tokenizer.max_length} fit {tokenizer.limit}; shorten it, or "
        f"set tasks.{tokenizer.task.name}.too_long to skip or truncate"
    )
