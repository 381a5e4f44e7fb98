"""What became of rows on their way to tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.tasks.checks import MOST_PROBLEMS


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
