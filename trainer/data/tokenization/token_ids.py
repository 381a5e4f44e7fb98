"""Rows that are token ids already -> examples within the context. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import Task
from trainer.data.column_parsers import NO_LABEL
from trainer.data.token_table import Example, TokenBlock, runs
from trainer.data.tokenization.report import CONTEXT_LIMIT, TokenizationReport, too_long


class TokenIdRowReader:
    """Rows of ``tokens`` within ``max_length`` tokens, by the policy of the task.

    Ids are used as they are: no BOS or EOS is added. Truncation removes tokens on the left; the
    label of the first remaining token is then ignored, because no token predicts it.

    Args:
        task: ``tokens`` and ``too_long``.
        max_length: most tokens of a row: the context minus the virtual tokens.
    """

    def __init__(self, task: Task, max_length: int) -> None:
        self.task, self.max_length = task, max_length
        self.limit = CONTEXT_LIMIT

    def __call__(
        self, first: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[TokenBlock, TokenizationReport]:
        assert self.task.tokens is not None
        names = self.task.tokens
        report, examples = TokenizationReport(len(rows)), list[Example]()
        for row, values in enumerate(rows, start=first):
            example = self._fit(row, values[names.input_ids], values[names.labels], report)
            examples += [example] if example is not None else []
        return TokenBlock.of(examples), report

    def _fit(
        self, row: int, ids: list[int], labels: list[int], report: TokenizationReport
    ) -> Example | None:
        if len(ids) > self.max_length:
            if self.task.too_long == "skip":
                report.skipped += 1
                return None
            if self.task.too_long == "refuse":
                report.add_problem(row, too_long(len(ids), self))
                return None
            ids = ids[-self.max_length :]
            labels = [NO_LABEL, *labels[-self.max_length :][1:]]
            if all(label == NO_LABEL for label in labels):
                report.add_problem(
                    row,
                    f"has no label among its last {self.max_length} tokens; set "
                    f"tasks.{self.task.name}.too_long to skip",
                )
                return None
            report.truncated += 1
        return Example(tuple(ids), runs([label != NO_LABEL for label in labels]), row)
