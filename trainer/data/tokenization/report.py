"""What became of rows on their way to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.config import Task
from trainer.data.row_validation import MAX_PROBLEMS
from trainer.data.token_table import TokenBlock

#: ``RowTokenizer.limit`` where virtual tokens stand in front.
BEHIND_PROMPT = "(context minus virtual tokens)"


#: Numbers of a ``TokenizationReport`` that are kept beside a table.
COUNTS = ("skipped", "truncated", "merged", "first_merged")


@dataclass
class TokenizationReport:
    """What became of some rows, or of all.

    Attributes:
        merged: rows whose input and target the tokenizer merges; ``first_merged`` is the first of
            them, -1 if there is none.
        count: rows with a problem.
        problems: what is wrong with rows: the first such row, and how many; the first few.
    """

    rows: int = 0
    skipped: int = 0
    truncated: int = 0
    merged: int = 0
    first_merged: int = -1
    count: int = 0
    problems: dict[str, tuple[int, int]] = field(default_factory=dict)

    def merge(self, row: int) -> None:
        """Count a row whose input and target the tokenizer merges."""
        self.merged += 1
        self.first_merged = row if self.first_merged < 0 else self.first_merged

    def problem(self, row: int, text: str, rows: int = 1) -> None:
        """Count a problem of ``rows`` rows, the first of which is number ``row``."""
        self.count += rows
        if text in self.problems or len(self.problems) < MAX_PROBLEMS:
            first, before = self.problems.get(text, (row, 0))
            self.problems[text] = (first, before + rows)

    def add(self, other: TokenizationReport) -> None:
        self.rows += other.rows
        self.skipped += other.skipped
        self.truncated += other.truncated
        self.merged += other.merged
        self.first_merged = other.first_merged if self.first_merged < 0 else self.first_merged
        kept = 0
        for text, (row, rows) in other.problems.items():
            self.problem(row, text, rows)
            kept += rows
        self.count += other.count - kept


class RowTokenizer(Protocol):
    """Makes examples of rows. It goes to the workers, so it knows a batch of rows, not their file.

    Attributes:
        max_length: most tokens of a row.
        limit: what sets that limit, for messages.
    """

    task: Task
    max_length: int
    limit: str

    def __call__(
        self, first: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[TokenBlock, TokenizationReport]:
        """Examples of consecutive rows, the first of which has the number ``first``."""
        ...


def too_long(num_tokens: int, fitter: RowTokenizer) -> str:
    """What is wrong with a row that the fitter does not take, and may not leave out or cut."""
    return (
        f"has {num_tokens} tokens, {fitter.max_length} fit {fitter.limit}; shorten it, or set "
        f"tasks.{fitter.task.name}.too_long to skip or truncate"
    )
