"""Rows that are token ids already, within the context. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import Task
from trainer.data.column_parsers import NO_LABEL
from trainer.data.token_table import Example, TokenBlock, runs
from trainer.data.tokenization.report import BEHIND_PROMPT, TokenizationReport, too_long


class TokenIdRowReader:
    """Rows of ``tokens`` within ``max_length`` tokens, by the policy of the task.

    They are taken as they are, without BOS or EOS of ours. Where a row is cut, it loses its left
    end; a label that then stands first is no label any more.

    Args:
        task: ``tokens`` and ``too_long``.
        max_length: most tokens of a row: the context minus the virtual tokens.
    """

    def __init__(self, task: Task, max_length: int) -> None:
        self.task, self.max_length = task, max_length
        self.limit = BEHIND_PROMPT

    def __call__(
        self, first: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[TokenBlock, TokenizationReport]:
        """Examples of consecutive rows, the first of which has the number ``first``."""
        assert self.task.tokens is not None
        names = self.task.tokens
        found, examples = TokenizationReport(len(rows)), list[Example]()
        for row, values in enumerate(rows, start=first):
            example = self._fit(row, values[names.input_ids], values[names.labels], found)
            examples += [example] if example is not None else []
        return TokenBlock.of(examples), found

    def _fit(
        self, row: int, ids: list[int], labels: list[int], found: TokenizationReport
    ) -> Example | None:
        setting = f"tasks.{self.task.name}.too_long"
        if len(ids) > self.max_length:
            if self.task.too_long == "skip":
                found.skipped += 1
                return None
            if self.task.too_long == "refuse":
                found.problem(row, too_long(len(ids), self))
                return None
            ids = ids[-self.max_length :]
            labels = [NO_LABEL, *labels[-self.max_length :][1:]]
            if all(label == NO_LABEL for label in labels):
                found.problem(
                    row,
                    f"has no label among its last {self.max_length} tokens; set {setting} to skip",
                )
                return None
            found.truncated += 1
        return Example(tuple(ids), runs([label != NO_LABEL for label in labels]), row)
