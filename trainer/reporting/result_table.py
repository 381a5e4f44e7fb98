"""Results of a run as tables: one row per baseline and prompt of a task. Imports no torch.

The terminal, the HTML report and the MLflow note render ``TaskTable.titles`` and
``TaskTable.cells``, so their columns, order of rows and numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from textwrap import shorten

from trainer.config import LOWER_IS_BETTER, Prompt, RunConfig, Task
from trainer.config.ranking import Entry, rank
from trainer.evaluation.prediction_files import HAND_WRITTEN, MAJORITY, NO_PROMPT, TEACHER
from trainer.evaluation.score_format import (
    DIVERGENCE,
    column_title,
    format_score,
    is_loss,
    score_text,
    shown_scores,
)
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.reporting.summary import (
    Baseline,
    Comparison,
    Overfitting,
    PromptResult,
    RunSummary,
    Selection,
    Stop,
    TaskResult,
)
from trainer.reporting.verdict import describe_comparison

#: Kind of the rows of trained prompts; the other kinds are those of baselines.
PROMPT = "prompt"
WIDEST_LABEL = 60
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
        detail: number of virtual tokens, and why the prompt was stopped early.
        stop: when and why the prompt was stopped early; None if all steps were trained.
        ranked: whether the prompt's score is comparable with the other prompts' scores.
        best: whether the row is the best prompt, or the best baseline, of the task.
    """

    kind: str
    label: str
    detail: str = ""
    stop: Stop | None = None
    ranked: bool = True
    best: bool = False

    @property
    def shown(self) -> dict[str, float]:
        """Scores by column; the loss of a distilled prompt is named a divergence."""
        return shown_scores(self.scores, self.teacher is not None)

    @property
    def short_label(self) -> str:
        """Label of at most ``WIDEST_LABEL`` characters."""
        if len(self.label) <= WIDEST_LABEL:
            return self.label
        end = "…”" if self.label.endswith("”") else "…"
        return self.label[: WIDEST_LABEL - len(end)] + end

    @property
    def tag(self) -> str:
        """``best prompt``, ``best baseline`` or an empty string."""
        return ("best prompt" if self.kind == PROMPT else "best baseline") if self.best else ""


@dataclass(frozen=True)
class TaskTable:
    """Results of one task.

    Attributes:
        rows: baselines, then prompts from best to worst, then prompts without a rank.
        num_rows: scored rows of each split.
    """

    task: str
    metric: str
    columns: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    num_rows: Mapping[str, int]
    comparison: Comparison | None = None
    selection: Selection | None = None
    overfitting: Overfitting | None = None

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

    @property
    def best_prompt(self) -> ResultRow | None:
        return next((row for row in self.prompts if row.best), None)

    @property
    def best_baseline(self) -> ResultRow | None:
        return next((row for row in self.baselines if row.best), None)

    @property
    def titles(self) -> list[str]:
        return [column_title(column) for column in self.columns]

    def cells(self, row: ResultRow) -> list[str]:
        """Format the scores of a row with 95% intervals, in the order of ``columns``."""
        return [self.cell(row, column) for column in self.columns]

    def comparable_baselines(self, prompt: ResultRow) -> list[ResultRow]:
        """Return the baselines that a prompt is compared with.

        If the task's metric is the loss, a distilled prompt is compared with the base model without
        a prompt, measured against the same teacher.
        """
        return _comparable(self.baselines, prompt, self.metric)

    def column(self, row: ResultRow) -> str:
        """Return the column of the task's metric; a distilled prompt's loss is a divergence."""
        key = f"validation_{self.metric}"
        return next(iter(shown_scores({key: 0.0}, row.teacher is not None)))

    def cell(self, row: ResultRow, column: str) -> str:
        """Format a score with its 95% interval, or a dash."""
        return score_text(row.shown, column, self.num_rows)

    @property
    def advised(self) -> ResultRow | None:
        """The prompt to take: the best one, or a shorter one that is as good; None: no prompt."""
        best, compared = self.best_prompt, self.comparison
        if best is None:
            return None
        name = self.overfitting.take if self.overfitting else best.name
        baseline = self.best_baseline
        if baseline is not None and compared is None:  # as with a single row
            if rank([baseline, best], self.metric)[:1] == [baseline]:
                return None
        elif baseline is not None and compared is not None and not compared.better:
            if not compared.also_better:
                return None
            if name not in compared.also_better:
                name = compared.also_better[0]
        return next(row for row in self.prompts if row.name == name)

    @property
    def headline(self) -> str:
        """Which prompt to take, in a few words."""
        advised, baseline = self.advised, self.best_baseline
        if self.best_prompt is None:
            return "No prompt can be recommended"
        if advised is None:
            assert baseline is not None
            return (
                "No trained prompt is significantly better than the best baseline "
                f"({baseline.short_label})"
            )
        tokens = advised.num_virtual_tokens
        return f"Take {advised.name} ({tokens} virtual token{'s' if tokens > 1 else ''})"

    def first_prompts(self, top: int) -> tuple[list[ResultRow], list[ResultRow]]:
        """Divide many prompts: the ``top`` best ones and the one to take, and the others."""
        prompts = self.prompts
        if len(prompts) <= top + 2:
            return prompts, []
        first = [*prompts[:top], *(row for row in prompts[top:] if row == self.advised)]
        return first, [row for row in prompts if row not in first]

    @property
    def verdict(self) -> str:
        """Whether a prompt beats the best baseline significantly, in one or two sentences."""
        prompt, baseline = self.best_prompt, self.best_baseline
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
        return describe_comparison(self.comparison, column, score, against, len(self.prompts))

    @property
    def advice(self) -> str:
        """The best of several prompts, and a shorter one that is nearly as good; may be empty."""
        best = self.selection
        if best is None or len(self.prompts) == 1:
            return ""
        text = f"Best prompt: {best.prompt} ({best.why})."
        if (shorter := best.shorter) and not (self.overfitting and self.overfitting.length):
            score = format_score(self.column(self.prompts[0]), shorter.score)
            text += (
                f" A shorter prompt within one standard error: {shorter.prompt}, "
                f"{shorter.num_virtual_tokens} virtual tokens, {score}."
            )
        return text


def task_tables(config: RunConfig, summary: RunSummary | None) -> list[TaskTable]:
    """Make the result table of every task; ``summary`` is None if the run has not finished."""
    return [_task_table(task, config, summary) for task in config.tasks]


def _task_table(task: Task, config: RunConfig, summary: RunSummary | None) -> TaskTable:
    summary, metric = summary or RunSummary(status="failed"), task.metric
    result = summary.tasks.get(task.name, TaskResult())
    settings = [prompt for prompt in config.prompts if prompt.task == task.name]
    prompts = [_prompt_row(p, summary.prompts.get(p.name, PromptResult())) for p in settings]
    ranked = [replace(row, best=i == 0) for i, row in enumerate(rank(prompts, metric))]
    places = {row.name for row in ranked}
    unranked = [replace(row, ranked=False) for row in prompts if row.name not in places]
    baselines = _baseline_rows(result, {prompt.name: prompt.teacher for prompt in settings})
    best = rank(_comparable(baselines, ranked[0] if ranked else None, metric), metric)[:1]
    baselines = [replace(row, best=True) if row in best else row for row in baselines]
    rows = (*baselines, *ranked, *unranked)
    columns = _columns({column for row in rows for column in row.shown}, metric)
    return TaskTable(
        *(task.name, metric, columns, rows, result.rows, result.comparison),
        selection=summary.selected.get(task.name),
        overfitting=summary.overfitting.get(task.name),
    )


def _comparable(
    baselines: list[ResultRow], prompt: ResultRow | None, metric: str
) -> list[ResultRow]:
    teacher = prompt.teacher if prompt and metric in LOWER_IS_BETTER else None
    return [row for row in baselines if row.teacher == teacher]


def _baseline_rows(result: TaskResult, teachers: Mapping[str, str | None]) -> list[ResultRow]:
    rows = []

    def add(kind: str, number: object, label: str, baseline: Baseline, teacher: str | None) -> None:
        name = f"{kind}-{number}" if number else kind
        row = ResultRow(name=name, kind=kind, label=label, scores=baseline.scores, teacher=teacher)
        rows.append(row)

    if majority := result.majority:
        add(MAJORITY, None, f'always "{majority.answer}"', majority, None)
    if (no_prompt := result.no_prompt) and no_prompt.scores:
        add(NO_PROMPT, None, "no prompt", no_prompt, None)
    for number, hand_written in enumerate(result.hand_written, 1):
        label = f"“{' '.join((hand_written.text or '').split())}”"
        add(HAND_WRITTEN, number, label, hand_written, None)
    for number, teacher in enumerate(result.teachers, 1):
        text = shorten(teacher.text or "", 60, placeholder=" …")
        add(TEACHER, number, f"teacher of {', '.join(teacher.prompts)}: “{text}”", teacher, None)
    for prompt, compared in result.untaught.items():
        label = f"no prompt, compared with the teacher of {prompt}"
        add(NO_PROMPT, prompt, label, compared, teachers.get(prompt) or prompt)
    return rows


def _prompt_row(prompt: Prompt, result: PromptResult) -> ResultRow:
    reason = result.stopped.reason if result.stopped else ""
    tokens = result.num_virtual_tokens or prompt.num_virtual_tokens
    length = f"{tokens} virtual token{'' if tokens == 1 else 's'}"
    distilled = prompt.objective == "distill"
    return ResultRow(
        name=prompt.name,
        kind=PROMPT,
        label=prompt.name,
        scores=result.scores,
        num_virtual_tokens=tokens,
        teacher=(prompt.teacher or prompt.name) if distilled else None,
        eliminated=reason == "halving",
        diverged=reason == "diverged",
        detail=", ".join(filter(None, [length, stopped_early(result)])),
        stop=result.stopped if reason in STOPPED else None,
    )


def stopped_early(result: PromptResult) -> str:
    """``eliminated by halving at step 20``, or an empty string if all steps were trained."""
    stop = result.stopped
    return f"{STOPPED[stop.reason]} at step {stop.step}" if stop and stop.reason in STOPPED else ""


def _columns(present: set[str], metric: str) -> tuple[str, ...]:
    """Order the columns: the task's metric with its OOD score, other rates, losses."""
    shifted = {f"shifted_validation_{metric}", f"shifted_validation{DIVERGENCE}"}

    def order(key: str) -> tuple[bool, bool, str, bool]:
        plain = key.removeprefix("shifted_")
        return plain != f"validation_{metric}", is_loss(plain), plain, plain != key

    columns = [key for key in present if key in shifted or not key.startswith("shifted_")]
    return tuple(sorted((key for key in columns if not key.endswith(STANDARD_ERROR)), key=order))
