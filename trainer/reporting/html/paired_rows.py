"""Paired differences of a task's baselines and prompts to its best prompt, from predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config import LOWER_IS_BETTER
from trainer.evaluation.prediction_files import baseline_file
from trainer.evaluation.score_format import format_difference
from trainer.evaluation.statistics import SIGNIFICANCE
from trainer.reporting.comparison import paired_difference
from trainer.reporting.result_table import PROMPT, TaskTable


@dataclass(frozen=True)
class PairedRow:
    """One row: ``outcome`` is ``better``, ``worse`` or ``not significant``."""

    label: str
    difference: str
    p_value: str
    outcome: str


def paired_rows(output_dir: Path, table: TaskTable) -> list[PairedRow]:
    """Compare with the best prompt, paired by row; entries without predictions are left out."""
    best, rows = table.best_prompt, []
    if best is None:
        return []
    column = table.column(best)
    compared = [*table.comparable_baselines(best), *(row for row in table.prompts if row.ranked)]
    for row in compared:
        if row.name == best.name and row.kind == PROMPT:
            continue
        file = row.name if row.kind == PROMPT else baseline_file(table.task, row.name)
        change = paired_difference(output_dir, file, best.name, table.metric)
        if change is None:
            continue
        values = (change.difference, change.low, change.high)
        value, low, high = (format_difference(column, each) for each in values)
        outcome = "not significant"
        if change.p_value < SIGNIFICANCE:
            lower_is_better = table.metric in LOWER_IS_BETTER
            outcome = "worse" if (change.difference < 0) != lower_is_better else "better"
        p_value = "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"
        rows.append(PairedRow(row.label, f"{value} ({low} to {high})", p_value, outcome))
    return rows
