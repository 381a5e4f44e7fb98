"""Read an output folder and compute the content of its report. No HTML."""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config import Prompt, RunConfig, load_output
from trainer.evaluation.lint.instructions import instructions_of
from trainer.evaluation.lint.results import CheckedText, LintResults, unmeasured
from trainer.evaluation.lint.rules import lint
from trainer.evaluation.prediction_files import HAND_WRITTEN, NO_PROMPT
from trainer.reporting.costs import Fact, cost_facts, cost_sentence
from trainer.reporting.evaluation import TaskEvaluation, load_evaluation
from trainer.reporting.html.inspection_view import InspectionView, inspection_view
from trainer.reporting.html.paired_rows import PairedRow, paired_rows
from trainer.reporting.html.plots import (
    COLORS,
    OTHERS,
    Curve,
    Plot,
    curve_plots,
    grid_plot,
    similarity_plot,
    speed_plot,
)
from trainer.reporting.html.prediction_views import PredictionReport, prediction_report
from trainer.reporting.html.run_warnings import DataSplit, data_splits, run_warnings
from trainer.reporting.html.sweep_grids import sweep_grids
from trainer.reporting.inspection import Inspection, load_inspection
from trainer.reporting.result_table import TaskTable, stopped_early, task_tables
from trainer.reporting.summary import PromptResult, RunSummary, load_summary
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object
from trainer.runtime.phases import breakdown
from trainer.runtime.redact import redact
from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.store_uri import install_ui_hint

#: Results of ``promptshard lint --measure`` in the output folder.
MEASURED_LINT = "lint/lint.json"
#: Lines of training steps that are kept of each prompt; a multiple of the points of a plot.
MOST_LINES = 2000


@dataclass
class TaskReport:
    """Content of a task's section.

    Attributes:
        colors: color of every prompt whose curves are drawn, by name.
        curves: plots by ``step`` and by ``useful_tokens``.
        grids: scores of a sweep over length and learning rate.
        paired: differences to the best prompt, from predictions; empty if ``evaluation`` has them.
        predictions: of the best prompt on the validation rows.
        evaluation: results of ``promptshard evaluate``; None if it was not run.
        inspections: of the task's prompts, the best one first.
        lint: findings in the task's hand-written texts.
    """

    table: TaskTable
    colors: dict[str, str]
    details: dict[str, str]
    curves: dict[str, list[Plot]]
    grids: list[Plot]
    paired: list[PairedRow]
    predictions: PredictionReport | None
    evaluation: TaskEvaluation | None
    inspections: list[InspectionView]
    lint: list[CheckedText]

    @property
    def verdict(self) -> list[str]:
        """Sentences on which prompt to take, and why."""
        table, signs = self.table, self.table.overfitting
        advice = "" if signs and signs.length else table.advice  # the signs compare lengths
        return [text for text in (table.verdict, advice, *(signs.verdict if signs else ())) if text]


@dataclass
class Report:
    """Content of the page.

    Attributes:
        time: seconds of the run by phase, as text.
        speed: plot of useful tokens per second.
        similarity: map of the cosines between prompts.
        remark: how to read the inspection of virtual tokens.
        commands: title and command of every suggested next step.
    """

    title: str
    status: str
    ended: str
    lead: str
    cost: str
    facts: list[Fact]
    time: str
    warnings: list[str]
    tasks: list[TaskReport]
    speed: Plot | None
    similarity: Plot | None
    remark: str
    data: list[DataSplit]
    environment: list[tuple[str, str]]
    settings: str
    commands: list[tuple[str, str]]

    @property
    def plots(self) -> list[Plot]:
        """All plots that have a PNG copy."""
        of_tasks = [
            plot
            for task in self.tasks
            for plots in (*task.curves.values(), task.grids)
            for plot in plots
        ]
        of_run = [plot for plot in (self.speed, self.similarity) if plot is not None]
        return [plot for plot in (*of_tasks, *of_run) if plot.png]


def collect(output_dir: Path) -> Report:
    """Read a run's files; a missing or damaged one counts as empty.

    Raises:
        BadInput: a newer version wrote ``summary.json``.
    """
    summary = load_summary(output_dir)
    results = summary or RunSummary(status="failed")
    config, settings = None, ""
    with suppress(BadInput, OSError):
        config = load_output(output_dir)
        settings = redact((output_dir / "run.yaml").read_text(encoding="utf-8"))
    lines = _read_metrics(output_dir)
    data = data_splits(output_dir, results)
    inspection, tasks = load_inspection(output_dir), []
    if config is not None:
        sources = _Sources(output_dir, config, results, lines, inspection)
        tasks = [sources.task_report(table) for table in task_tables(config, summary)]
    ended = max((line.time for group in lines.values() for line in group), default=None)
    tokens = max((line.useful_tokens or 0 for line in lines.get(None, [])), default=0)
    return Report(
        title=output_dir.resolve().name,
        status=summary.status if summary else "unfinished",
        ended="" if ended is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ended)),
        lead=_lead(config, results.world_size) if config else "",
        cost=cost_sentence(results),
        facts=cost_facts(results, tokens),
        time=breakdown(results.time) if results.time else "",
        warnings=run_warnings(summary, data),
        tasks=tasks,
        speed=_speed(lines.get(None, [])),
        similarity=_similarity(inspection),
        remark=inspection.remark if inspection else "",
        data=data,
        environment=_environment(output_dir, results),
        settings=settings,
        commands=_commands(output_dir, config, results) if config else [],
    )


def _read_metrics(output_dir: Path) -> dict[str | None, list[Line]]:
    """Return the metric lines by prompt; None: of the whole run.

    Of the training steps of a long run, only some are kept, at about equal distances and with the
    last one: all would need gigabytes, and a plot has few points.
    """
    validations: dict[str | None, list[Line]] = defaultdict(list)
    steps: dict[str | None, list[Line]] = defaultdict(list)
    strides: dict[str | None, int] = defaultdict(lambda: 1)
    last: dict[str | None, Line] = {}
    for line, _ in read_lines(output_dir / METRICS_FILE):
        if line is None:
            continue
        if line.is_validation:
            validations[line.prompt].append(line)
            continue
        last[line.prompt] = line
        kept = steps[line.prompt]
        if line.step % strides[line.prompt] == 0:
            kept.append(line)
        if len(kept) > MOST_LINES:
            strides[line.prompt] *= 2
            kept[:] = [each for each in kept if each.step % strides[line.prompt] == 0]
    for name, line in last.items():
        if steps[name][-1:] != [line]:
            steps[name].append(line)
    return {name: steps[name] + validations[name] for name in {**steps, **validations}}


@dataclass(frozen=True)
class _Sources:
    """Everything that the sections of the tasks are made from."""

    output_dir: Path
    config: RunConfig
    results: RunSummary
    lines: Mapping[str | None, Sequence[Line]]
    inspection: Inspection | None

    def task_report(self, table: TaskTable) -> TaskReport:
        config, results, best = self.config, self.results, table.best_prompt
        details = {
            prompt.name: _detail(prompt, results.prompts.get(prompt.name, PromptResult()))
            for prompt in config.prompts
            if prompt.task == table.task
        }
        evaluation = load_evaluation(self.output_dir)
        of_task = evaluation.tasks.get(table.task) if evaluation else None
        choices, predictions = config.task(table.task).choices or [], None
        if best is not None:
            predictions = prediction_report(self.output_dir, best.name, choices, table.metric)
        return TaskReport(
            table=table,
            colors={row.name: c for row, c in zip(table.prompts, COLORS, strict=False)},
            details=details,
            curves=self._curves(table),
            grids=[
                grid_plot(f"{table.task}-sweep-{i}", grid)
                for i, grid in enumerate(sweep_grids(config, table), 1)
            ],
            paired=[] if of_task else paired_rows(self.output_dir, table),
            predictions=predictions,
            evaluation=of_task,
            inspections=self._inspections(table),
            lint=_lint(self.output_dir, config, table.task),
        )

    def _curves(self, table: TaskTable) -> dict[str, list[Plot]]:
        colors = [*COLORS, *[OTHERS] * len(table.prompts)]
        curves = [
            Curve(row.name, color, self.lines.get(row.name, ()))
            for row, color in zip(table.prompts, colors, strict=False)
        ]
        if not any(curve.lines for curve in curves):
            return {}
        distilled = [row.teacher is not None for row in table.prompts]
        title = "loss per target token"
        if any(distilled):
            title = "KL divergence per target token" + ("" if all(distilled) else ", or loss")
        levels = _levels(table)
        return {
            x: curve_plots(table.task, curves, table.metric, levels, x, title)
            for x in ("step", "useful_tokens")
        }

    def _inspections(self, table: TaskTable) -> list[InspectionView]:
        inspected = self.inspection.prompts if self.inspection else {}
        names = [row.name for row in table.prompts if row.name in inspected]
        return [inspection_view(name, inspected[name]) for name in names]


def _lint(output_dir: Path, config: RunConfig, task: str) -> list[CheckedText]:
    """Return the hand-written texts of a task that have findings, with effects if measured."""
    texts = [unmeasured(each, lint(each.text, each.words)) for each in instructions_of(config)]
    with suppress(BadInput, ValidationError):
        values = read_json_object(output_dir / MEASURED_LINT)
        measured = {
            (each.task, each.text): each for each in LintResults.model_validate(values).prompts
        }
        texts = [measured.get((each.task, each.text), each) for each in texts]
    return [each for each in texts if each.task == task and each.findings]


def _speed(lines: Sequence[Line]) -> Plot | None:
    name = "useful_tokens_per_second"
    speeds = [(line.step, line.metrics[name]) for line in lines if name in line.metrics]
    return speed_plot(speeds) if len(speeds) > 1 else None


def _similarity(inspection: Inspection | None) -> Plot | None:
    if inspection is None or len(inspection.similarity.prompts) < 2:
        return None
    similarity = inspection.similarity
    return similarity_plot("prompt-similarity", similarity.prompts, similarity.cosine)


def _levels(table: TaskTable) -> dict[str, float]:
    """Return the plot's level lines: scores without a prompt and of the best baseline."""
    distilled = next((row for row in table.prompts if row.teacher is not None), None)
    column = table.column(distilled) if distilled else f"validation_{table.metric}"
    return {
        "best hand-written" if row.kind == HAND_WRITTEN else row.label: row.shown[column]
        for row in table.baselines
        if column in row.shown and (row.best or row.name == NO_PROMPT)
    }


def _environment(output_dir: Path, summary: RunSummary) -> list[tuple[str, str]]:
    environment: dict[str, Any] = {}
    with suppress(BadInput):
        environment = read_json_object(output_dir / "environment.json")
    versions = environment.pop("versions", None)
    versions = versions if isinstance(versions, dict) else summary.versions
    pairs = [*environment.items(), *versions.items()]
    return [(key.replace("_", " "), str(value)) for key, value in pairs if value]


def _commands(output_dir: Path, config: RunConfig, summary: RunSummary) -> list[tuple[str, str]]:
    """Suggest commands, among them the upload if MLflow could not be reached."""
    folder = shlex.quote(config.output_dir)
    selected = (best.prompt for best in summary.selected.values())
    prompt = next(selected, config.prompts[0].name)
    state = ProgressFile(output_dir)
    store = state.store or f"sqlite:///{output_dir.resolve()}/mlflow.db"
    page = state.stores[store].page if store in state.stores else None
    where = f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    if store.startswith("http"):
        where = f"{store}/{page or ''}"
    else:
        opened = page and f"then open http://127.0.0.1:5000/{page}"
        where = "\n# ".join([where, *filter(None, [opened, install_ui_hint()])])
    try_it = f'promptshard generate {folder} --prompt {shlex.quote(prompt)} --input "..."'
    commands = [("Try a prompt", try_it), ("Compare runs and curves in MLflow", where)]
    if state.problem:
        commands.append(("Upload missing metrics", f"promptshard sync {folder}"))
    load = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{config.base.model}")\n'
        f'model = PeftModel.from_pretrained(base, "{config.output_dir}/prompts/{prompt}")'
    )
    return [*commands, ("Use it in Python, with PEFT", load)]


def _lead(config: RunConfig, ranks: int | None) -> str:
    prompts, tasks = _count(len(config.prompts), "prompt"), _count(len(config.tasks), "task")
    text = f"{prompts} for {tasks}, trained on one frozen {Path(config.base.model).name}"
    text += " in 8 bits" if config.base.quantization == "int8" else ""
    return text + (f" on {_count(ranks, 'rank')}" if ranks else "")


def _detail(prompt: Prompt, result: PromptResult) -> str:
    relative = prompt.relative_learning_rate
    rate = f"lr {prompt.learning_rate or 0:g}" if relative is None else f"relative lr {relative:g}"
    details = [
        _count(result.num_virtual_tokens or prompt.num_virtual_tokens, "virtual token"),
        prompt.method.replace("_", " ").replace("p tuning", "p-tuning"),
        rate,
        "distilled" if prompt.objective == "distill" else "",
        "" if result.best_step is None else f"best at step {result.best_step}",
        stopped_early(result),
    ]
    return " · ".join(filter(None, details))


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
