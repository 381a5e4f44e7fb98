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

from trainer.config import Prompt, RunConfig, load_output
from trainer.evaluation.prediction_files import HAND_WRITTEN, NO_PROMPT
from trainer.reporting.evaluation import TaskEvaluation, load_evaluation
from trainer.reporting.html.plots import COLORS, Curve, curves_svg, sparkline_svg
from trainer.reporting.html.prediction_views import PredictionReport, prediction_report
from trainer.reporting.html.run_warnings import DataSplit, data_splits, run_warnings
from trainer.reporting.result_table import TaskTable, stopped_early, task_tables
from trainer.reporting.summary import PromptResult, RunSummary, load_summary
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object
from trainer.runtime.phases import breakdown
from trainer.runtime.redact import redact
from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.store_uri import install_ui_hint


@dataclass
class TaskReport:
    """Content of a task's section.

    Attributes:
        colors: color of every prompt whose curves are drawn, by name.
        predictions: of the best prompt on the validation rows.
        evaluation: results of ``promptshard evaluate``; None if it was not run.
    """

    table: TaskTable
    colors: dict[str, str]
    details: dict[str, str]
    plots: dict[str, str]
    predictions: PredictionReport | None
    evaluation: TaskEvaluation | None = None


@dataclass
class Report:
    """Content of the page.

    Attributes:
        time: seconds of the run by phase, as text.
        throughput: SVG of useful tokens per second.
        commands: title and command of every suggested next step.
    """

    title: str
    status: str
    ended: str
    lead: str
    facts: list[tuple[str, str]]
    time: str
    warnings: list[str]
    tasks: list[TaskReport]
    throughput: str
    data: list[DataSplit]
    environment: list[tuple[str, str]]
    settings: str
    commands: list[tuple[str, str]]


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
    lines: dict[str | None, list[Line]] = defaultdict(list)  # by prompt; None: of the whole run
    for line, _ in read_lines(output_dir / METRICS_FILE):
        if line is not None:
            lines[line.prompt].append(line)
    data = data_splits(output_dir, results)
    tables = task_tables(config, summary) if config else []
    tasks = [_task_report(output_dir, table, config, results, lines) for table in tables if config]
    if (evaluation := load_evaluation(output_dir)) is not None:
        for task in tasks:
            task.evaluation = evaluation.tasks.get(task.table.task)
    ended = max((line.time for group in lines.values() for line in group), default=None)
    speeds = [
        (line.step, line.metrics["useful_tokens_per_second"])
        for line in lines[None]
        if "useful_tokens_per_second" in line.metrics
    ]
    return Report(
        title=output_dir.resolve().name,
        status=summary.status if summary else "unfinished",
        ended="" if ended is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ended)),
        lead=_lead(config, results.world_size) if config else "",
        facts=_facts(results, lines[None]),
        time=breakdown(results.time) if results.time else "",
        warnings=run_warnings(summary, data, tables),
        tasks=tasks,
        throughput=sparkline_svg(speeds) if len(speeds) > 1 else "",
        data=data,
        environment=_environment(output_dir, results),
        settings=settings,
        commands=_commands(output_dir, config, results) if config else [],
    )


def _task_report(
    output_dir: Path,
    table: TaskTable,
    config: RunConfig,
    results: RunSummary,
    lines: Mapping[str | None, Sequence[Line]],
) -> TaskReport:
    details = {
        prompt.name: _detail(prompt, results.prompts.get(prompt.name, PromptResult()))
        for prompt in config.prompts
        if prompt.task == table.task
    }
    colors = {row.name: color for row, color in zip(table.prompts, COLORS, strict=False)}
    curves = [Curve(name, color, lines.get(name, ())) for name, color in colors.items()]
    distilled = [row.teacher is not None for row in table.prompts]
    plots = {}
    if any(curve.lines for curve in curves):
        title = "loss per target token"
        if any(distilled):
            title = "KL divergence per target token" + ("" if all(distilled) else ", or loss")
        levels = _levels(table)
        plots = {
            x: curves_svg(curves, table.metric, levels, x, title) for x in ("step", "useful_tokens")
        }
    choices, best = config.task(table.task).choices or [], table.best_prompt
    predictions = None
    if best is not None:
        predictions = prediction_report(output_dir, best.name, choices, table.metric)
    return TaskReport(table, colors, details, plots, predictions)


def _levels(table: TaskTable) -> dict[str, float]:
    """Return the plot's level lines: scores without a prompt and of the best baseline."""
    distilled = next((row for row in table.prompts if row.teacher is not None), None)
    column = table.column(distilled) if distilled else f"validation_{table.metric}"
    return {
        "best hand-written" if row.kind == HAND_WRITTEN else row.label: row.shown[column]
        for row in table.baselines
        if column in row.shown and (row.best or row.name == NO_PROMPT)
    }


def _facts(summary: RunSummary, lines: Sequence[Line]) -> list[tuple[str, str]]:
    memory, waited = summary.memory, summary.throughput.data_wait_share
    speed = summary.throughput.useful_tokens_per_second
    tokens = max((line.useful_tokens or 0 for line in lines), default=0)
    facts = [
        ("steps", summary.steps),
        ("useful tokens", f"{tokens:,}" if tokens else None),
        ("useful tokens/s", f"{speed:,.0f}" if speed else None),
        ("data-loading wait", f"{waited:.1%}" if waited is not None else None),
        ("ranks", summary.world_size),
        ("base per rank", _size(memory.base_bytes_per_rank)),
        ("peak memory (RSS)", _size(memory.peak_rss_bytes)),
        ("peak GPU memory", _size(memory.peak_gpu_bytes)),
        ("all-gather volume / step", _size(summary.communication.gathered_bytes_per_step)),
        ("base load time", f"{summary.load.seconds:.1f} s" if summary.load.seconds else None),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


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
        f"{result.num_virtual_tokens or prompt.num_virtual_tokens} virtual tokens",
        prompt.method.replace("_", " ").replace("p tuning", "p-tuning"),
        rate,
        "distilled" if prompt.objective == "distill" else "",
        "" if result.best_step is None else f"best at step {result.best_step}",
        stopped_early(result),
    ]
    return " · ".join(filter(None, details))


def _size(count: float | None) -> str | None:
    if count is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
