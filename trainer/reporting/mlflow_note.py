"""Note, final metrics and final tags of a run for MLflow. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from trainer.config import load_output
from trainer.config.ranking import rank
from trainer.evaluation.prediction_files import HAND_WRITTEN, MAJORITY, NO_PROMPT, TEACHER
from trainer.evaluation.score_format import PREFIXES
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.reporting.evaluation import (
    Evaluation,
    cells,
    label,
    load_evaluation,
    remarks,
    titles,
)
from trainer.reporting.markdown_text import markdown
from trainer.reporting.result_table import PROMPT, ResultRow, TaskTable, task_tables
from trainer.reporting.summary import PromptResult, RunSummary, load_summary
from trainer.runtime.errors import BadInput
from trainer.tracking import run_metadata
from trainer.tracking.run_metadata import MAX_TAG, FinalResults, clean_tags, shorten

#: The artifact that has everything.
REPORT = "report.html"


def read_results(output_dir: Path) -> FinalResults:
    """Compute the note, and metrics and tags of every prompt; all empty if ``run.yaml`` is damaged.

    Raises:
        BadInput: a newer version wrote ``summary.json``.
    """
    summary = load_summary(output_dir) or RunSummary(status="failed")
    try:
        config = load_output(output_dir)
    except BadInput:
        return FinalResults("", {})
    tables = task_tables(config, summary)
    prompts = {}
    for table in tables:
        for row in table.prompts:
            result = summary.prompts.get(row.name, PromptResult())
            stopped = result.stopped and result.stopped.reason
            selected = table.selection is not None and table.selection.prompt == row.name
            prompts[row.name] = run_metadata.PromptResult(
                result.best_step or summary.steps or 0,
                final_metrics(table, row),
                clean_tags({"stopped": stopped, "selected": "yes" if selected else None}),
            )
    return FinalResults(note(tables, load_evaluation(output_dir)), prompts)


def final_metrics(table: TaskTable, prompt: ResultRow) -> dict[str, float]:
    """Return the scores of a saved adapter, and those of its baselines in the task's metric.

    Names: ``validation_accuracy_best``, ``validation_accuracy_no_prompt``,
    ``validation_accuracy_hand_written`` (the best hand-written prompt), ``..._teacher``,
    ``..._majority``. MLflow sorts a name with a suffix next to its curve; a prefix with a slash
    would create a section of single points before all curves. The losses of a distilled prompt and
    of its baseline are divergences from the teacher.
    """
    scores = dict(_finite_scores(prompt.scores))
    # MLflow's table of models shows the columns in this order.
    first = [key for key in scores if key.endswith(f"validation_{table.metric}")]
    metrics = {f"{key}_best": scores[key] for key in dict.fromkeys([*first, *scores])}
    baselines = table.comparable_baselines(prompt)
    for kind in (NO_PROMPT, HAND_WRITTEN, TEACHER, MAJORITY):
        for best in rank([row for row in baselines if row.kind == kind], table.metric)[:1]:
            metrics |= {
                f"{key}_{kind}": value
                for key, value in _finite_scores(best.scores)
                if key.endswith(f"validation_{table.metric}")
            }
    return metrics


def note(tables: list[TaskTable], evaluation: Evaluation | None = None) -> str:
    """Return the parent run's description (Markdown): verdict and result table of every task.

    After ``promptshard evaluate``, with its tables.
    """
    lines = []
    for table in tables:
        subject = f"**{markdown(table.task)}**: " if len(tables) > 1 else ""
        lines += [subject + _text(table.verdict, 600, REPORT), ""]
        if table.overfitting and table.overfitting.verdict:
            lines += [_text(" ".join(table.overfitting.verdict), 900, REPORT), ""]
    for table in tables:
        lines += [f"#### Task {markdown(table.task)}", ""]
        lines += [f"| {' | '.join(['prompt', *map(markdown, table.titles)])} |"]
        lines += ["|---|" + "---:|" * len(table.columns)]
        for row in table.rows:
            name, tag = _text(row.label), f", {row.tag}" if row.tag else ""
            shown = f"**{name}** ({row.detail})" if row.kind == PROMPT else name
            lines.append(f"| {' | '.join([shown + tag, *table.cells(row)])} |")
        lines.append("")
    for name, task in evaluation.tasks.items() if evaluation else ():
        lines += [f"#### Evaluation of {markdown(name)} on {task.rows:,} rows", ""]
        lines += [f"| {' | '.join(['prompt', *map(markdown, titles(task))])} |"]
        lines += ["|---|" + "---:|" * len(titles(task))]
        for arm in task.arms:
            lines.append(f"| {' | '.join([_text(label(task, arm)), *cells(task, arm)])} |")
        lines += ["", *(f"{markdown(line)}  " for line in remarks(task)), ""]
    return _limited("\n".join(lines))


def _limited(text: str) -> str:
    """Cut a text to the limit of a tag at the end of a line: a cut number would be a wrong one."""
    if len(text) <= MAX_TAG:
        return text
    end = f"\n\nThe rest is in {REPORT}."
    return text[: text.rindex("\n", 0, MAX_TAG - len(end) + 1)] + end


def _finite_scores(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    return [
        (key, float(value))
        for key, value in scores.items()
        if key.startswith(PREFIXES) and not key.endswith(STANDARD_ERROR) and math.isfinite(value)
    ]


def _text(text: str, limit: int = 160, place: str = "run.yaml") -> str:
    return markdown(shorten(" ".join(text.split()), limit, place))
