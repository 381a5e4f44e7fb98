"""Feed of training rows: the packed rows of each update, sampled per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.config import RunConfig
from trainer.data.dataset import MixtureComponent, RowDataset
from trainer.data.sampler import TokenBudgetSampler
from trainer.data.task_data import TaskData
from trainer.data.token_table import Example, TokenTable
from trainer.packing.packed_batch import PackedRow


class BatchSource:
    """Hands out the rows of every prompt's next update.

    Each prompt has a cursor of its own, so its rows depend on nothing but its own settings. Rows
    that several prompts read in one step, as those of one ``data_seed`` do, are made once.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, TaskData]) -> None:
        self._examples = [tasks[prompt.task].train for prompt in config.prompts]
        self._teachers = [tasks[p.task].teachers.get(p.name) for p in config.prompts]
        self._cursors = [
            TokenBudgetSampler(
                examples.lengths,
                config.training.tokens_per_step,
                config.data_seed(prompt),
                _components(examples, tasks[prompt.task].train_rows),
            )
            for prompt, examples in zip(config.prompts, self._examples, strict=True)
        ]

    def next_step(self, active: Sequence[bool]) -> list[PackedRow]:
        """The rows of one step, for every prompt that still trains."""
        packed_rows: list[PackedRow] = []
        made: dict[tuple[int, int], Example] = {}
        for k, cursor in enumerate(self._cursors):
            if active[k]:
                table = self._examples[k]
                for row in cursor.next_rows():
                    key = (id(table), row)
                    if key not in made:
                        made[key] = table[row]
                    packed_rows.append(
                        PackedRow(made[key], k, len(packed_rows), teacher=self._teachers[k])
                    )
        return packed_rows

    def state_dict(self) -> list[dict[str, Any]]:
        return [cursor.state_dict() for cursor in self._cursors]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        for cursor, saved in zip(self._cursors, state, strict=True):
            cursor.load_state_dict(saved)


def _components(examples: TokenTable, rows: RowDataset) -> list[MixtureComponent]:
    """Mixture components as ranges of examples instead of rows: rows may have been skipped."""
    bounds = [(component.start, component.stop) for component in rows.components]
    return [
        replace(component, start=start, stop=stop)
        for component, (start, stop) in zip(
            rows.components, np.searchsorted(examples.rows_R, bounds).tolist(), strict=True
        )
    ]
