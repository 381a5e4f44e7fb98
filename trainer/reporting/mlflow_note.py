"""Note, final metrics and final tags of a run for MLflow. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import yaml_source
from trainer.config.ranking import rank
from trainer.evaluation.result_table import (
    HAND_WRITTEN,
    MAJORITY,
    NO_PROMPT,
    PROMPT,
    TEACHER,
    comparable_baselines,
    task_tables,
)
from trainer.evaluation.score_format import column_title
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object
from trainer.tracking.run_files import mapping, named
from trainer.tracking.run_metadata import (
    MAX_TAG,
    FinalResults,
    PromptResult,
    clean_tags,
    shorten,
)


def read_results(output_dir: Path) -> FinalResults:
    """Read the final results of a run from ``run.yaml`` and ``summary.json``.

    A missing or damaged file counts as empty.
    """
    run = yaml_source.saved(output_dir / "run.yaml")
    try:
        summary = read_json_object(output_dir / "summary.json")
    except BadInput:
        summary = {}
    return final_results(run, summary)


def final_results(run: Mapping[str, Any], summary: Mapping[str, Any]) -> FinalResults:
    """Compute the final results.

    Args:
        run: the run file, with every default written out.
        summary: content of ``summary.json``.
    """
    prompts = {}
    for prompt in named(run.get("prompts")):
        step, metrics = final_metrics(prompt, run, summary)
        prompts[str(prompt["name"])] = PromptResult(step, metrics, final_tags(prompt, summary))
    return FinalResults(note(run, summary), prompts)


def final_metrics(
    prompt: Mapping[str, Any], run: Mapping[str, Any], summary: Mapping[str, Any]
) -> tuple[int, dict[str, float]]:
    """Return the step and scores of the saved adapter, and the scores of its baselines.

    Names: ``validation_accuracy_best``, and for the task's own metric also
    ``validation_accuracy_no_prompt``, ``validation_accuracy_hand_written`` (the best hand-written
    prompt), ``..._teacher`` and ``validation_accuracy_majority``. A suffix sorts them next to their
    curve in MLflow; a prefix with a slash would create a section of single points before all
    curves. The loss of a distilled prompt is a divergence from its teacher, and so is the baseline
    it is compared with.
    """
    result = mapping(mapping(summary.get("prompts")).get(prompt["name"]))
    metrics = {task["name"]: task.get("metric") for task in named(run.get("tasks"))}
    metric = metrics.get(str(prompt.get("task"))) or "loss"
    step = int(result.get("best_step") or summary.get("steps") or 0)
    scores = {f"{key}_best": value for key, value in _scores(result)}
    baselines = comparable_baselines(prompt, metric, run, summary)
    for kind in (NO_PROMPT, HAND_WRITTEN, TEACHER, MAJORITY):
        for best in rank([row for row in baselines if row.kind == kind], metric)[:1]:
            scores |= {
                f"{key}_{kind}": value
                for key, value in _scores(best.scores)
                if key.endswith(f"validation_{metric}")
            }
    return step, scores


def final_tags(prompt: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str]:
    """Return filterable tags: why training stopped, and whether the prompt was selected."""
    name = prompt["name"]
    end = mapping(mapping(mapping(summary.get("prompts")).get(name)).get("stopped"))
    chosen = mapping(mapping(summary.get("selected")).get(str(prompt.get("task"))))
    is_selected = name == chosen.get("prompt")
    return clean_tags({"stopped": end.get("reason"), "selected": "yes" if is_selected else None})


def note(run: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return the parent run's description (Markdown): verdict and result table of every task."""
    lines = []
    tables = task_tables(run, summary)
    for table in tables:
        subject = f"**{table.task}**: " if len(tables) > 1 else ""
        lines += [_cell(subject + table.verdict, 600), ""]
    for table in tables:
        titles = " | ".join(map(column_title, table.columns))
        lines += [f"#### Task {table.task}", "", f"| prompt | {titles} |"]
        lines += ["|---|" + "---:|" * len(table.columns)]
        for row in table.rows:
            label = f"**{row.label}** ({row.detail})" if row.kind == PROMPT else row.label
            label += f", {row.tag}" if row.tag else ""
            cells = " | ".join(table.cell(row, column) for column in table.columns)
            lines.append(f"| {_cell(label)} | {cells} |")
        lines.append("")
    return "\n".join(lines)[:MAX_TAG]


def _scores(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the finite validation scores of a result, without their standard errors."""
    return [
        (key, float(value))
        for key, value in row.items()
        if key.startswith(("validation_", "shifted_validation_"))
        and not key.endswith(STANDARD_ERROR)
        and isinstance(value, int | float)
        and math.isfinite(value)
    ]


def _cell(text: str, limit: int = 160) -> str:
    return shorten(" ".join(text.split()).replace("|", "\\|"), limit)
