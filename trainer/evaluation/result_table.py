"""Results of a run as tables: one row per baseline and prompt of a task.

The terminal, the HTML report and MLflow's note render the same rows, columns and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

from trainer.config import LOWER_IS_BETTER
from trainer.config.ranking import Entry, rank
from trainer.evaluation.score_format import (
    DIVERGENCE,
    format_difference,
    format_score,
    is_loss,
    score_text,
    shown_scores,
)
from trainer.evaluation.statistics import RATES, STANDARD_ERROR, rate_standard_error

#: Kinds of rows, in the order of a table.
MAJORITY, NO_PROMPT, HAND_WRITTEN, PROMPT = "majority", "no_prompt", "hand_written", "prompt"
#: The text that prompts with ``objective: distill`` learn from, scored as a prompt itself.
TEACHER = "teacher"
#: Characters of a label in one line.
WIDEST_LABEL = 60
#: How a table names the reasons for which a prompt was stopped before its steps were done.
STOPPED = {
    "early_stopping": "stopped early",
    "halving": "eliminated by halving",
    "diverged": "diverged",
}


@dataclass(frozen=True, kw_only=True)
class ResultRow(Entry):
    """One row of a task's table.

    Attributes:
        kind: one of ``MAJORITY``, ``NO_PROMPT``, ``HAND_WRITTEN``, ``TEACHER``, ``PROMPT``.
        label: what the row is called for people.
        detail: length of a prompt and how it ended.
        ranked: whether it has a score that is comparable with those of the others.
        best: the best prompt, or the best baseline, of the task.
    """

    kind: str
    label: str
    detail: str = ""
    ranked: bool = True
    best: bool = False

    @property
    def shown(self) -> dict[str, float]:
        """Scores as people read them: only a cross-entropy is called a loss."""
        return shown_scores(self.scores, self.teacher is not None)

    @property
    def short_label(self) -> str:
        """The label for one line of a terminal."""
        if len(self.label) <= WIDEST_LABEL:
            return self.label
        end = "…”" if self.label.endswith("”") else "…"
        return self.label[: WIDEST_LABEL - len(end)] + end

    @property
    def tag(self) -> str:
        """What marks the row in a table; empty for most."""
        if not self.best:
            return ""
        return "best prompt" if self.kind == PROMPT else "best baseline"


@dataclass(frozen=True)
class TaskTable:
    """Results of one task.

    Attributes:
        columns: names of scores, as in ``ResultRow.shown``.
        rows: baselines, then prompts from best to worst, then those without a rank.
        num_rows: scored rows of each split, by its name.
        comparison: of the best prompt with the best baseline, as ``comparison.compare`` makes it.
    """

    task: str
    metric: str
    columns: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    num_rows: Mapping[str, int]
    comparison: Mapping[str, Any] | None = None

    @property
    def counts(self) -> str:
        """``60 validation rows, 40 OOD validation rows``; empty if they are unknown."""
        return ", ".join(
            f"{count:,} {split.replace('shifted_validation', 'OOD validation')} rows"
            for split, count in self.num_rows.items()
        )

    @property
    def baselines(self) -> list[ResultRow]:
        return [row for row in self.rows if row.kind != PROMPT]

    @property
    def prompts(self) -> list[ResultRow]:
        return [row for row in self.rows if row.kind == PROMPT]

    def column(self, row: ResultRow) -> str:
        """The column of the task's metric; a distilled prompt's loss is a divergence."""
        key = f"validation_{self.metric}"
        return next(iter(shown_scores({key: 0.0}, row.teacher is not None)))

    def cell(self, row: ResultRow, column: str) -> str:
        """A score with its 95% interval, or a dash."""
        return score_text(row.shown, column, self.num_rows)

    @property
    def verdict(self) -> str:
        """Whether a prompt beats the best baseline significantly, in one or two sentences."""
        prompt = next((row for row in self.prompts if row.best), None)
        baseline = next((row for row in self.baselines if row.best), None)
        if prompt is None:
            if len({row.teacher for row in self.prompts}) > 1 and self.metric in LOWER_IS_BETTER:
                return "Divergences from different teachers are not compared; see the table."
            return "No prompt has a finite validation score to compare with a baseline."
        column = self.column(prompt)
        score = f"{prompt.name} ({format_score(column, prompt.shown[column])})"
        if baseline is None:
            return f"There is no baseline to compare with; best prompt: {score}."
        against = f"{baseline.short_label}: {format_score(column, baseline.shown.get(column))}"
        if self.comparison is None:
            return f"Best prompt: {score}; best baseline ({against}); no paired test was possible."
        return _compared(self.comparison, column, score, against, len(self.prompts))

    def standard_error(self, row: Entry) -> float:
        """Standard error of an entry's score in the task's metric; NaN if it is unknown."""
        key = f"validation_{self.metric}"
        if self.metric in RATES and self.num_rows.get("validation"):
            return rate_standard_error(row.scores[key], self.num_rows["validation"])
        return float(row.scores.get(key + STANDARD_ERROR, math.nan))


def task_tables(run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[TaskTable]:
    """Make the table of every task of a run.

    Args:
        run: the run file, with every default written out.
        summary: what ``summary.json`` holds; empty for a run that has not finished.
    """
    return [_task_table(task, run, summary) for task in run.get("tasks") or []]


def _task_table(
    task: Mapping[str, Any], run: Mapping[str, Any], summary: Mapping[str, Any]
) -> TaskTable:
    name, metric = str(task["name"]), str(task.get("metric", "loss"))
    results = (summary.get("tasks") or {}).get(name) or {}
    settings = [p for p in run.get("prompts") or [] if p.get("task") == name]
    scored = summary.get("prompts") or {}
    prompts = [_prompt_row(p, scored.get(p["name"]) or {}) for p in settings]
    baselines = _baseline_rows(results, {str(p["name"]): p.get("teacher") for p in settings})
    ranked = [replace(row, best=i == 0) for i, row in enumerate(rank(prompts, metric))]
    places = {row.name for row in ranked}
    unranked = [replace(row, ranked=False) for row in prompts if row.name not in places]
    teacher = ranked[0].teacher if ranked and metric in LOWER_IS_BETTER else None
    best = rank([row for row in baselines if row.teacher == teacher], metric)[:1]
    baselines = [replace(row, best=True) if row in best else row for row in baselines]
    rows = (*baselines, *ranked, *unranked)
    present = {column for row in rows for column in row.shown}
    return TaskTable(
        name,
        metric,
        _columns(present, metric),
        rows,
        results.get("rows") or {},
        results.get("comparison"),
    )


def comparable_baselines(
    prompt: Mapping[str, Any], metric: str, run: Mapping[str, Any], summary: Mapping[str, Any]
) -> list[ResultRow]:
    """Return the baselines that one prompt is compared with.

    Where the task's metric is the loss, a distilled prompt is compared with what the base model
    does without a prompt, measured against the same teacher.

    Args:
        prompt: of the run file.
        metric: of its task.
    """
    task = prompt.get("task")
    teachers = {
        str(p["name"]): p.get("teacher") for p in run.get("prompts") or [] if p.get("task") == task
    }
    rows = _baseline_rows((summary.get("tasks") or {}).get(task) or {}, teachers)
    teacher = _prompt_row(prompt, {}).teacher if metric in LOWER_IS_BETTER else None
    return [row for row in rows if row.teacher == teacher]


def _baseline_rows(
    results: Mapping[str, Any], teachers: Mapping[str, str | None]
) -> list[ResultRow]:
    rows = []
    if majority := results.get("majority"):
        label = f'always "{majority.get("answer", "")}"'
        rows.append(ResultRow(name=MAJORITY, kind=MAJORITY, label=label, scores=majority))
    if scores := results.get("no_prompt"):
        rows.append(ResultRow(name=NO_PROMPT, kind=NO_PROMPT, label="no prompt", scores=scores))
    for number, scores in enumerate(results.get("hand_written") or [], 1):
        text = " ".join(str(scores.get("text", "")).split())
        rows.append(
            ResultRow(
                name=f"{HAND_WRITTEN}-{number}", kind=HAND_WRITTEN, label=f"“{text}”", scores=scores
            )
        )
    for number, scores in enumerate(results.get("teachers") or [], 1):
        text = shorten(" ".join(str(scores.get("text", "")).split()), 60, placeholder=" …")
        of = ", ".join(map(str, scores.get("prompts") or []))
        rows.append(
            ResultRow(
                name=f"{TEACHER}-{number}",
                kind=TEACHER,
                label=f"teacher of {of}: “{text}”",
                scores=scores,
            )
        )
    for prompt, scores in (results.get("untaught") or {}).items():
        rows.append(
            ResultRow(
                name=f"{NO_PROMPT}-{prompt}",
                kind=NO_PROMPT,
                label=f"no prompt, compared with the teacher of {prompt}",
                scores=scores,
                teacher=teachers.get(prompt) or prompt,
            )
        )
    return rows


def _prompt_row(prompt: Mapping[str, Any], result: Mapping[str, Any]) -> ResultRow:
    end = result.get("stopped") or {}
    tokens = result.get("num_virtual_tokens") or prompt.get("num_virtual_tokens") or 0
    detail = [f"{tokens} virtual tokens"]
    if end.get("reason") in STOPPED:
        detail.append(f"{STOPPED[end['reason']]} at step {end.get('step')}")
    distilled = "distill" in (prompt.get("objective"), result.get("objective"))
    return ResultRow(
        name=str(prompt["name"]),
        kind=PROMPT,
        label=str(prompt["name"]),
        scores=result,
        num_virtual_tokens=tokens,
        teacher=str(prompt.get("teacher") or prompt["name"]) if distilled else None,
        eliminated=end.get("reason") == "halving",
        diverged=end.get("reason") == "diverged",
        detail=", ".join(detail),
    )


def _compared(
    comparison: Mapping[str, Any], column: str, score: str, against: str, num_prompts: int
) -> str:
    """The sentences of ``TaskTable.verdict`` with a paired test."""
    rows, p_value = f"{comparison['rows']:,}", comparison["p_value"]
    unit = "" if is_loss(column) else " points"
    low, high = (format_difference(column, comparison[key]) for key in ("low", "high"))
    numbers = (
        f"difference {format_difference(column, comparison['difference'])}{unit} (95% interval "
        f"{low} to {high}; {comparison['test']}, "
        f"p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'})"
    )
    if comparison["better"]:
        text = (
            f"Prompt {score} beats the best baseline ({against}) significantly on {rows} "
            f"validation rows: {numbers}."
        )
        if num_prompts > 1:
            text += f" It is the best of {num_prompts} prompts on these rows, so it is optimistic."
        return text
    also = ", ".join(comparison["also_better"])
    subject = "The best prompt does not beat" if also else "No prompt beats"
    text = (
        f"{subject} the best baseline ({against}) significantly on {rows} validation rows: best "
        f"prompt {score}, {numbers}."
    )
    if also:
        text += f" Significantly better, each tested alone: {also}."
    if not is_loss(column) and comparison["detectable_difference"] > 1:
        return f"{text} {rows} rows are too few for any significant difference."
    detectable = format_difference(column, comparison["detectable_difference"]).lstrip("+")
    return f"{text} {rows} rows can show a difference of about {detectable}{unit} or more."


def _columns(present: set[str], metric: str) -> tuple[str, ...]:
    """Order the columns: the task's metric with its OOD score, other rates, losses."""
    found = {key for key in present if not key.endswith(STANDARD_ERROR)}
    own = {f"shifted_validation_{metric}", f"shifted_validation{DIVERGENCE}"}
    found = {key for key in found if not key.startswith("shifted_") or key in own}

    def order(key: str) -> tuple[bool, bool, str, bool]:
        shifted = key.startswith("shifted_")
        plain = key.removeprefix("shifted_")
        return plain != f"validation_{metric}", is_loss(plain), plain, shifted

    return tuple(sorted(found, key=order))
