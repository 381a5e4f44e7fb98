"""From an output folder to what the page shows. No HTML and no plotting in here."""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import yaml_parser, yaml_source
from trainer.evaluation.result_table import (
    HAND_WRITTEN,
    NO_PROMPT,
    STOPPED,
    ResultRow,
    TaskTable,
    task_tables,
)
from trainer.evaluation.score_format import format_score
from trainer.reporting.html.plots import COLORS, Curve, curves_svg, sparkline_svg
from trainer.reporting.html.prediction_views import PredictionReport, prediction_report
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json
from trainer.runtime.phase_times import breakdown
from trainer.runtime.redact import redact
from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines
from trainer.tracking.progress_file import ProgressFile

MOST_CURVES = len(COLORS)
WIDE_GAP = 0.10  #: a drop from validation to OOD validation that is worth a warning


@dataclass
class TaskReport:
    """What the page shows of a task.

    Attributes:
        colors: of the prompts whose curves are drawn, by name.
        details: settings of every prompt, by name.
        plots: SVG by x axis.
        left_out: prompts without a curve.
        selected: the best prompt and why, where there are several.
        predictions: of the best prompt on the validation rows.
    """

    name: str
    table: TaskTable
    colors: dict[str, str]
    details: dict[str, str]
    plots: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    selected: str = ""
    predictions: PredictionReport | None = None

    @property
    def metric(self) -> str:
        return self.table.metric


@dataclass
class Report:
    title: str
    status: str
    ended: str
    lead: str
    facts: list[tuple[str, str]]
    time: str  #: of the run, by phase
    warnings: list[str]
    tasks: list[TaskReport]
    throughput: str
    data: list[dict[str, Any]]
    environment: list[tuple[str, str]]
    settings: str
    commands: list[tuple[str, str]]


def collect(output_dir: Path) -> Report:
    summary, environment = _json(output_dir, "summary.json"), _json(output_dir, "environment.json")
    run = yaml_source.saved(output_dir / "run.yaml")
    lines = [line for line, _ in read_lines(output_dir / METRICS_FILE) if line is not None]
    of_prompt: dict[str | None, list[Line]] = defaultdict(list)
    for line in lines:
        of_prompt[line.prompt].append(line)
    data = _data(output_dir, summary)
    tasks = [
        _task(output_dir, table, run, summary, of_prompt) for table in task_tables(run, summary)
    ]
    base = Path(str((run.get("base") or {}).get("model", "the base"))).name
    ended = max((line.time for line in lines), default=None)
    return Report(
        title=output_dir.resolve().name,
        status=str(summary.get("status", "unfinished")),
        ended="" if ended is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ended)),
        lead=_lead(base, run, summary),
        facts=_facts(summary, lines),
        time=breakdown(times) if (times := summary.get("time")) else "",
        warnings=_warnings(summary, data, tasks),
        tasks=tasks,
        throughput=_throughput(of_prompt[None]),
        data=data,
        environment=_environment(environment, summary),
        settings=redact(yaml_parser.dump(run)) if run else "",
        commands=_commands(output_dir, run),
    )


def _task(
    output_dir: Path,
    table: TaskTable,
    run: dict[str, Any],
    summary: dict[str, Any],
    of_prompt: dict[str | None, list[Line]],
) -> TaskReport:
    results = summary.get("prompts") or {}
    settings = [p for p in run.get("prompts") or [] if p.get("task") == table.task]
    details = {str(p["name"]): _detail(p, results.get(p["name"]) or {}) for p in settings}
    colors = {row.name: color for row, color in zip(table.prompts, COLORS, strict=False)}
    curves = [Curve(name, color, of_prompt[name]) for name, color in colors.items()]
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
    return TaskReport(
        table.task,
        table,
        colors,
        details,
        plots,
        len(table.prompts) - len(colors),
        _selected(table, (summary.get("selected") or {}).get(table.task)),
        _predictions(output_dir, table, run),
    )


def _predictions(
    output_dir: Path, table: TaskTable, run: dict[str, Any]
) -> PredictionReport | None:
    best = next((row for row in table.prompts if row.best), None)
    if best is None:
        return None
    task = next(task for task in run["tasks"] if task["name"] == table.task)
    choices = list(map(str, task.get("choices") or []))
    return prediction_report(output_dir, best.name, choices, table.metric)


def _selected(table: TaskTable, choice: dict[str, Any] | None) -> str:
    if choice is None or len(table.prompts) == 1:
        return ""
    text = f"Best prompt: {choice['prompt']} ({choice['why']})."
    if shorter := choice.get("shorter"):
        score = format_score(table.column(table.prompts[0]), shorter["score"])
        text += (
            f" A shorter prompt within one standard error: {shorter['prompt']}, "
            f"{shorter['num_virtual_tokens']} virtual tokens, {score}."
        )
    return text


def _levels(table: TaskTable) -> dict[str, float]:
    """Level lines of the plot: the score without a prompt, and that of the best baseline."""
    levels = {}
    column = f"validation_{table.metric}"
    if any(row.teacher is not None for row in table.prompts):
        column = table.column(next(row for row in table.prompts if row.teacher is not None))
    for row in table.baselines:
        if column in row.shown and (row.best or row.name == NO_PROMPT):
            levels[row.label if row.kind != HAND_WRITTEN else "best hand-written"] = row.shown[
                column
            ]
    return levels


def _warnings(
    summary: dict[str, Any], data: list[dict[str, Any]], tasks: list[TaskReport]
) -> list[str]:
    found = []
    if summary.get("status") == "failed":
        found.append(f"The run failed: {summary.get('error') or 'see logs/ in the output folder'}.")
    elif not summary:
        found.append("The run did not finish (no summary.json).")
    for item in data:
        if item["also_in_train"]:
            rows = [f"{here} is {there}" for here, there in item["leaked_rows"]]
            rows += ["..."] if item["also_in_train"] > len(rows) else []
            found.append(
                f"{item['task']}: {item['also_in_train']} of {item['rows']} {item['split']} rows "
                f"also appear in the training data ({'; '.join(rows)}); scores may be inflated."
            )
        for what, remedy in (
            ("skipped", "too long for the context (tasks.too_long: skip)"),
            ("truncated", "cut from the left (tasks.too_long: truncate)"),
        ):
            if item[what]:
                of = f" of {item['rows']}" if item["rows"] else ""
                found.append(
                    f"{item['task']} {item['split']}: {item[what]}{of} rows were {what}, {remedy}."
                )
    for name, result in (summary.get("prompts") or {}).items():
        if (end := result.get("stopped") or {}).get("reason") == "diverged":
            found.append(
                f"{name}: diverged and was stopped at step {end['step']}; other prompts "
                "continued. A lower learning_rate may help."
            )
        if result.get("skipped_updates"):
            found.append(f"{name}: {result['skipped_updates']} non-finite updates were skipped.")
    for task in tasks:
        found += [warning for row in task.table.prompts for warning in _gap(task, row)]
    return found


def _gap(task: TaskReport, row: ResultRow) -> list[str]:
    inside = row.scores.get(f"validation_{task.metric}")
    outside = row.scores.get(f"shifted_validation_{task.metric}")
    if task.metric == "loss" or inside is None or outside is None or inside - outside < WIDE_GAP:
        return []
    return [
        f"{row.label}: {outside:.1%} on OOD validation rows but {inside:.1%} on validation rows; "
        "it may have overfitted to the training context. Fewer virtual tokens, fewer steps or more "
        "varied training rows may help."
    ]


def _facts(summary: dict[str, Any], lines: list[Line]) -> list[tuple[str, str]]:
    memory, load = summary.get("memory") or {}, summary.get("load") or {}
    throughput = summary.get("throughput") or {}
    speed, waited = (throughput.get(k) for k in ("useful_tokens_per_second", "data_wait_share"))
    gathered = (summary.get("communication") or {}).get("gathered_bytes_per_step")
    tokens = max((l_.useful_tokens or 0 for l_ in lines if l_.prompt is None), default=0)
    facts = [
        ("steps", summary.get("steps")),
        ("useful tokens", f"{tokens:,}" if tokens else None),
        ("useful tokens/s", f"{speed:,.0f}" if speed else None),
        ("data-loading wait", f"{waited:.1%}" if waited is not None else None),
        ("ranks", summary.get("world_size")),
        ("base per rank", size(memory.get("base_bytes_per_rank"))),
        ("peak memory (RSS)", size(memory.get("peak_rss_bytes"))),
        ("peak GPU memory", size(memory.get("peak_gpu_bytes"))),
        ("all-gather volume / step", size(gathered)),
        ("base load time", f"{load['seconds']:.1f} s" if load.get("seconds") else None),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _data(output_dir: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    counts = summary.get("data") or {}
    rows = []
    for item in _json(output_dir, "datasets.json", list):
        count = (counts.get(item.get("task")) or {}).get(item.get("split")) or {}
        rows.append(
            {
                "task": item.get("task"),
                "split": str(item.get("split", "")).replace("_", " "),
                "path": item.get("path"),
                "rows": item.get("rows"),
                "digest": str(item.get("digest", "")),
                "skipped": count.get("skipped", 0),
                "truncated": count.get("truncated", 0),
                "also_in_train": count.get("also_in_train", 0),
                "leaked_rows": item.get("also_in_train", []),
            }
        )
    return rows


def _environment(environment: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [(k, v) for k, v in environment.items() if k != "versions" and v]
    versions = environment.get("versions") or summary.get("versions") or {}
    return [(k.replace("_", " "), str(v)) for k, v in [*pairs, *versions.items()]]


def _commands(output_dir: Path, run: dict[str, Any]) -> list[tuple[str, str]]:
    folder = shlex.quote(str(run.get("output_dir") or output_dir))
    selected = (_json(output_dir, "summary.json").get("selected") or {}).values()
    names = [p["name"] for p in run.get("prompts") or []]
    prompt = str(next(iter([*(found["prompt"] for found in selected), *names]), "NAME"))
    try_it = f'promptshard generate {folder} --prompt {shlex.quote(prompt)} --input "..."'
    commands = [("Try a prompt", try_it)]
    state = ProgressFile(output_dir)
    store = state.store or f"sqlite:///{output_dir.resolve()}/mlflow.db"
    page = state.stores[store].page if store in state.stores else None
    where = f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    if store.startswith("http"):
        where = f"{store}/{page or ''}"
    elif page:
        where += f"\n# then open http://127.0.0.1:5000/{page}"
    commands.append(("Compare runs and curves in MLflow", where))
    commands.append(("Upload metrics that MLflow is missing", f"promptshard sync {folder}"))
    model = (run.get("base") or {}).get("model", "BASE")
    adapter = f"{run.get('output_dir') or output_dir}/prompts/{prompt}"
    load = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{model}")\n'
        f'model = PeftModel.from_pretrained(base, "{adapter}")'
    )
    return [*commands, ("Use it in Python, with PEFT", load)]


def _throughput(lines: list[Line]) -> str:
    points = [
        (line.step, line.metrics["useful_tokens_per_second"])
        for line in lines
        if "useful_tokens_per_second" in line.metrics
    ]
    return sparkline_svg(points) if len(points) > 1 else ""


def _lead(base: str, run: dict[str, Any], summary: dict[str, Any]) -> str:
    prompts, tasks = len(run.get("prompts") or []), len(run.get("tasks") or [])
    ranks = summary.get("world_size")
    stored = (run.get("base") or {}).get("quantization")
    text = (
        f"{_count(prompts, 'prompt')} for {_count(tasks, 'task')}, trained over one frozen {base}"
    )
    text += " in 8 bits" if stored == "int8" else ""
    return text + (f" on {_count(ranks, 'rank')}" if ranks else "")


def _detail(prompt: dict[str, Any], result: dict[str, Any]) -> str:
    tokens = result.get("num_virtual_tokens") or prompt.get("num_virtual_tokens")
    method = str(prompt.get("method", "")).replace("_", " ").replace("p tuning", "p-tuning")
    relative, rate = prompt.get("relative_learning_rate"), prompt.get("learning_rate")
    words = f"relative lr {relative:g}" if relative is not None else f"lr {rate:g}"
    parts = [f"{tokens} virtual tokens", method, words]
    if prompt.get("objective") == "distill":
        parts.append("distilled")
    if result.get("best_step") is not None:
        parts.append(f"best at step {result['best_step']}")
    end = result.get("stopped") or {}
    if end.get("reason") in STOPPED:
        parts.append(f"{STOPPED[end['reason']]} at step {end['step']}")
    return " · ".join(parts)


def size(count: float | None) -> str | None:
    if count is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _json(output_dir: Path, name: str, kind: type[Any] = dict) -> Any:
    """An object or list of a file; an empty one where the file is missing or damaged."""
    try:
        value = read_json(output_dir / name)
    except BadInput:
        return kind()
    return value if isinstance(value, kind) else kind()
