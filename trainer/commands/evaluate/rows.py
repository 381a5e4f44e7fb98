"""Rows of an evaluation: a selection of a task's rows, or the same rows after a change."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.config import Task
from trainer.data.dataset import RowDataset
from trainer.data.row_hashing import first_by_hash, split_by_hash
from trainer.data.task_data import Candidates, EvalSet
from trainer.data.token_table import TokenTable
from trainer.data.tokenization.tokenize import RowProgress, tokenize


@dataclass(frozen=True)
class RowEncoder:
    """Tokenizes rows that ``load_tasks`` has not.

    Attributes:
        vocab_size: of the base.
        date, end_ids, progress: as in ``tokenize``.
    """

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    vocab_size: int
    date: datetime.date | None
    end_ids: Collection[int]
    progress: RowProgress

    def encode(
        self,
        like: EvalSet,
        rows: RowDataset,
        *,
        task: Task | None = None,
        virtual_tokens: int = 0,
        position: str = "front",
        prefix: str = "",
    ) -> EvalSet:
        """Tokenize the rows of an evaluation set after a change, all of them.

        Args:
            like: the set with the original rows.
            rows: the changed rows, in the same order.
            task: with other templates or limits; default: that of the set.
            virtual_tokens: number of tokens that the prompt takes from the context.

        Raises:
            BadInput: rows are too long (unless ``task.too_long`` is truncate) or give no tokens.
        """
        task = task or like.task
        table = self.table(
            rows,
            task,
            per_choice=task.scored_by_likelihood,
            virtual_tokens=virtual_tokens,
            position=position,
            prefix=prefix,
        )
        candidates = Candidates(table, like.candidates.width, range(len(rows)))
        assert len(table) == len(rows) * candidates.width, "no row is skipped"
        return EvalSet(like.task, like.split, rows, candidates, like.gold)

    def table(
        self, rows: RowDataset, task: Task, *, virtual_tokens: int = 0, **options: Any
    ) -> TokenTable:
        """Tokenize rows; ``options`` as in ``tokenize``."""
        return tokenize(
            rows,
            task,
            self.tokenizer,
            self.context_length - virtual_tokens,
            date=self.date,
            end_ids=self.end_ids,
            progress=self.progress,
            **options,
        ).examples


def halves(rows: EvalSet) -> tuple[list[int], list[int]]:
    """Divide the indices of the rows of a set by their content; a half can be empty."""
    hashes = rows.rows.hashes()[np.asarray(rows.row_numbers)]
    first, second = split_by_hash(hashes, 0.5)
    return first.tolist(), second.tolist()


def at_most(rows: EvalSet, count: int | None) -> list[int]:
    """Indices of ``count`` rows of a set, those with the smallest content hash."""
    if count is None or len(rows.candidates) <= count:
        return list(range(len(rows.candidates)))
    hashes = rows.rows.hashes()[np.asarray(rows.row_numbers)]
    indices: list[int] = first_by_hash(hashes, count).tolist()
    return indices
