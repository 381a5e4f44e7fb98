"""Paired comparison of a task's prompts with its best baseline, from the files of predictions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import LOWER_IS_BETTER
from trainer.evaluation.prediction_files import Outcomes, baseline_file, outcomes, path_of, read
from trainer.evaluation.result_table import ResultRow, TaskTable
from trainer.evaluation.statistics import RATES, Difference, paired_rates, paired_ratios


def compare(output_dir: Path, table: TaskTable) -> dict[str, Any] | None:
    """Compare every ranked prompt of a task with the best baseline, paired by row.

    Returns:
        For the summary: ``baseline`` and ``prompt`` (the best ones), ``rows``, ``test``,
        ``difference`` (prompt minus baseline) with ``low``, ``high`` and ``p_value``,
        ``detectable_difference``, ``better`` (whether the best prompt is significantly better) and
        ``also_better`` (other prompts that are); None where there is nothing to compare.
    """
    prompt = next((row for row in table.prompts if row.best), None)
    baseline = next((row for row in table.baselines if row.best), None)
    if prompt is None or baseline is None:
        return None
    of_baseline = _outcomes(output_dir, baseline_file(table.task, baseline.name), table.metric)
    if of_baseline is None:
        return None
    found = {}
    for row in table.prompts:
        if row.ranked:
            difference = _difference(output_dir, row, of_baseline, table.metric)
            if difference is not None:
                found[row.name] = difference
    if prompt.name not in found:
        return None
    best = asdict(found[prompt.name])
    best["detectable_difference"] = best.pop("detectable")
    better = [name for name, d in found.items() if _is_better(d, table.metric)]
    return {
        "baseline": baseline.name,
        "prompt": prompt.name,
        "rows": len(of_baseline.rows),
        **best,
        "better": prompt.name in better,
        "also_better": [name for name in better if name != prompt.name],
    }


def _difference(
    output_dir: Path, row: ResultRow, of_baseline: Outcomes, metric: str
) -> Difference | None:
    of_prompt = _outcomes(output_dir, row.name, metric)
    if of_prompt is None or of_prompt.rows != of_baseline.rows or len(of_baseline.rows) < 2:
        return None
    if metric in RATES:
        return paired_rates(list(map(bool, of_prompt.sums)), list(map(bool, of_baseline.sums)))
    return paired_ratios((of_prompt.sums, of_prompt.counts), (of_baseline.sums, of_baseline.counts))


def _outcomes(output_dir: Path, name: str, metric: str) -> Outcomes | None:
    try:
        return outcomes(read(path_of(output_dir, name)), metric)
    except (OSError, ValueError, KeyError, TypeError):  # damaged: reported as not compared
        return None


def _is_better(difference: Difference, metric: str) -> bool:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return difference.significant and sign * difference.difference > 0
