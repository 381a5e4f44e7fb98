"""Compare a task's prompts with its best baseline, paired by row of their predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config import LOWER_IS_BETTER
from trainer.evaluation.prediction_files import Outcomes, baseline_file, outcomes, path_of, read
from trainer.evaluation.score_format import score_interval
from trainer.evaluation.statistics import (
    RATES,
    Difference,
    paired_rates,
    paired_ratios,
    ratio_scores,
)
from trainer.reporting.result_table import TaskTable
from trainer.reporting.summary import Comparison


@dataclass(frozen=True)
class FileScore:
    """Score of a prediction file, with its 95% interval if that is known."""

    rows: int
    score: float
    interval: tuple[float, float] | None


def compare(output_dir: Path, table: TaskTable) -> Comparison | None:
    """Compare every ranked prompt of a task with the best baseline, paired by row.

    Returns None if there is no ranked prompt or baseline, or if their predictions are missing.
    """
    prompt, baseline = table.best_prompt, table.best_baseline
    if prompt is None or baseline is None:
        return None
    of_baseline = _outcomes(output_dir, baseline_file(table.task, baseline.name), table.metric)
    if of_baseline is None:
        return None
    differences = {}
    for name in [row.name for row in table.prompts if row.ranked]:
        difference = _difference(output_dir, name, of_baseline, table.metric)
        if difference is not None:
            differences[name] = difference
    if prompt.name not in differences:
        return None
    sign = -1 if table.metric in LOWER_IS_BETTER else 1
    better = [name for name, d in differences.items() if d.significant and sign * d.difference > 0]
    return Comparison(
        baseline=baseline.name,
        prompt=prompt.name,
        rows=len(of_baseline.rows),
        **vars(differences[prompt.name]),
        better=prompt.name in better,
        also_better=[name for name in better if name != prompt.name],
    )


def paired_difference(output_dir: Path, first: str, second: str, metric: str) -> Difference | None:
    """Compare the scores of two prediction files, paired by row; None if their rows differ.

    Args:
        first, second: names for ``path_of``.
    """
    of_second = _outcomes(output_dir, second, metric)
    return None if of_second is None else _difference(output_dir, first, of_second, metric)


def score_of_file(output_dir: Path, name: str, metric: str) -> FileScore | None:
    """Score of a prediction file with its interval; None if the file is missing or damaged."""
    of_file = _outcomes(output_dir, name, metric)
    if of_file is None:
        return None
    scores = ratio_scores(f"validation_{metric}", of_file.sums, of_file.counts)
    interval = score_interval(scores, f"validation_{metric}", {"validation": len(of_file.rows)})
    return FileScore(len(of_file.rows), scores[f"validation_{metric}"], interval)


def _difference(
    output_dir: Path, prompt: str, of_baseline: Outcomes, metric: str
) -> Difference | None:
    of_prompt = _outcomes(output_dir, prompt, metric)
    if of_prompt is None or of_prompt.rows != of_baseline.rows or len(of_baseline.rows) < 2:
        return None
    if metric in RATES:
        return paired_rates(list(map(bool, of_prompt.sums)), list(map(bool, of_baseline.sums)))
    return paired_ratios((of_prompt.sums, of_prompt.counts), (of_baseline.sums, of_baseline.counts))


def _outcomes(output_dir: Path, name: str, metric: str) -> Outcomes | None:
    try:
        return outcomes(read(path_of(output_dir, name)), metric)
    except (OSError, ValueError, KeyError, TypeError):  # damaged: not compared
        return None
