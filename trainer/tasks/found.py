"""What became of rows on their way to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.config import Task
from trainer.tasks.checks import MOST_PROBLEMS
from trainer.tasks.table import Block

#: ``Fitter.limit`` where virtual tokens stand in front.
BEHIND_PROMPT = "(context minus virtual tokens)"


@dataclass
class Found:
    """What became of some rows, or of all. Problems: (row, what is wrong with it), the first."""

    rows: int = 0
    skipped: int = 0
    truncated: int = 0
    count: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)

    def problem(self, row: int, text: str) -> None:
        self.count += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append((row, text))

    def add(self, other: Found) -> None:
        self.rows += other.rows
        self.skipped += other.skipped
        self.truncated += other.truncated
        self.count += other.count
        self.problems = (self.problems + other.problems)[:MOST_PROBLEMS]


class Fitter(Protocol):
    """Makes examples of rows. It goes to the workers, so it knows a batch of rows, not their file.

    Attributes:
        max_length: most tokens of a row.
        limit: what sets that limit, for messages.
    """

    task: Task
    max_length: int
    limit: str

    def __call__(self, first: int, rows: Sequence[Mapping[str, Any]]) -> tuple[Block, Found]:
        """Examples of consecutive rows, the first of which has the number ``first``."""
        ...


def too_long(num_tokens: int, fitter: Fitter) -> str:
    """What is wrong with a row that the fitter does not take, and may not leave out or cut."""
    return (
        f"has {num_tokens} tokens, {fitter.max_length} fit {fitter.limit}; shorten it, or set "
        f"tasks.{fitter.task.name}.too_long to skip or truncate"
    )
