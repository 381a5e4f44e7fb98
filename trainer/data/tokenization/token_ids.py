"""Tokenized rows -> examples within the context. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.column_parsers import NO_LABEL
from trainer.data.token_table import Example, runs
from trainer.data.tokenization.row_tokenizer import RowTokenizer, TokenizationReport


class TokenIdRowReader(RowTokenizer):
    """Reads rows of ``tokens``; no BOS or EOS is added.

    Truncation removes tokens on the left, and the label of the first remaining token, because no
    token predicts it.
    """

    def examples(
        self, row: int, values: Mapping[str, Any], report: TokenizationReport
    ) -> list[Example]:
        assert self.task.tokens is not None
        ids, labels = values[self.task.tokens.input_ids], values[self.task.tokens.labels]
        if len(ids) > self.max_length:
            if not self.may_truncate(row, len(ids), report):
                return []
            ids = ids[-self.max_length :]
            labels = [NO_LABEL, *labels[-self.max_length :][1:]]
            if all(label == NO_LABEL for label in labels):
                report.add_problem(
                    row,
                    f"has no label among its last {self.max_length} tokens; set "
                    f"tasks.{self.task.name}.too_long to skip",
                )
                return []
            report.truncated += 1
        return [Example(tuple(ids), runs([label != NO_LABEL for label in labels]), row)]
