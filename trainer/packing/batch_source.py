"""Sample the training rows of every prompt's next update."""

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
from trainer.packing.packed_row import PackedRow


class BatchSource:
    """Samples the rows of every prompt's next update.

    Each prompt has its own sampler, so its rows depend on its own settings only. Rows that several
    prompts read in the same step (equal ``data_seed``) are decoded once.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, TaskData]) -> None:
        self._examples = [tasks[p.task].train_at(p.placement) for p in config.prompts]
        self._teachers = [tasks[p.task].teachers.get(p.name) for p in config.prompts]
        self._samplers = [
            TokenBudgetSampler(
                examples.own_lengths,
                config.training.tokens_per_step,
                config.data_seed(prompt),
                _components(examples, tasks[prompt.task].train_rows),
            )
            for prompt, examples in zip(config.prompts, self._examples, strict=True)
        ]

    def next_step(self, active: Sequence[bool]) -> list[PackedRow]:
        """Return the rows of one step, for every prompt that still trains."""
        rows: list[PackedRow] = []
        examples: dict[tuple[int, int], Example] = {}
        for k, sampler in enumerate(self._samplers):
            if active[k]:
                table = self._examples[k]
                for index in sampler.next_rows():
                    key = (id(table), index)
                    if key not in examples:
                        examples[key] = table[index]
                    rows.append(PackedRow(examples[key], k, len(rows), teacher=self._teachers[k]))
        return rows

    def state_dict(self) -> list[dict[str, Any]]:
        return [sampler.state_dict() for sampler in self._samplers]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        for sampler, saved in zip(self._samplers, state, strict=True):
            sampler.load_state_dict(saved)


def _components(examples: TokenTable, rows: RowDataset) -> list[MixtureComponent]:
    """Convert components from ranges of rows to ranges of examples: rows may have been skipped."""
    bounds = [(component.start, component.stop) for component in rows.components]
    return [
        replace(component, start=start, stop=stop)
        for component, (start, stop) in zip(
            rows.components, np.searchsorted(examples.rows_R, bounds).tolist(), strict=True
        )
    ]
