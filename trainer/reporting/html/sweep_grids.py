"""Scores of a sweep over the length of prompts and the learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean

from trainer.config import LOWER_IS_BETTER, Prompt, RunConfig
from trainer.evaluation.score_format import column_title, format_score
from trainer.reporting.html.plots import Grid
from trainer.reporting.result_table import TaskTable


def sweep_grids(config: RunConfig, table: TaskTable) -> list[Grid]:
    """Return the grids of each method that has several lengths or several learning rates.

    One has the task's metric, and one the loss, which still differs where all scores are equal.
    """
    by_method: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in config.prompts:
        if prompt.task == table.task:
            by_method[prompt.method].append(prompt)
    grids = (
        _grid(table, metric, method, prompts)
        for method, prompts in by_method.items()
        for metric in dict.fromkeys((table.metric, "loss"))
    )
    return [grid for grid in grids if grid is not None]


def _grid(table: TaskTable, metric: str, method: str, prompts: list[Prompt]) -> Grid | None:
    column, best = f"validation_{metric}", table.best_prompt
    scores = {
        row.name: row.scores[column] for row in table.prompts if row.ranked and column in row.scores
    }
    cells: dict[tuple[int, float], list[float]] = defaultdict(list)
    for prompt in prompts:
        if prompt.name in scores:
            cells[prompt.num_virtual_tokens, _rate(prompt)].append(scores[prompt.name])
    lengths, rates = sorted({n for n, _ in cells}), sorted({rate for _, rate in cells})
    if len(cells) < 3 or max(len(lengths), len(rates)) < 2:
        return None
    places = {
        prompt.name: (lengths.index(prompt.num_virtual_tokens), rates.index(_rate(prompt)))
        for prompt in prompts
        if prompt.name in scores
    }
    values = [
        [fmean(cells[n, rate]) if (n, rate) in cells else math.nan for rate in rates]
        for n in lengths
    ]
    return Grid(
        title=f"{column_title(column)}, {method.replace('_', ' ')}",
        rows=[str(n) for n in lengths],
        columns=[f"{rate:g}" if rate else "default" for rate in rates],
        row_title="virtual tokens",
        column_title="relative learning rate"
        if all(prompt.relative_learning_rate for prompt in prompts)
        else "learning rate",
        values=values,
        texts=[["" if math.isnan(v) else format_score(column, v) for v in row] for row in values],
        best=places.get(best.name) if best else None,
        lower_is_better=metric in LOWER_IS_BETTER,
    )


def _rate(prompt: Prompt) -> float:
    return prompt.relative_learning_rate or prompt.learning_rate or 0.0
