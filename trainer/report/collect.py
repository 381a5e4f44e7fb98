"""From an output folder to what the page shows. No HTML and no plotting in here."""

from __future__ import annotations

import json
import shlex
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import runfile, yaml_core
from trainer.config import LOWER_IS_BETTER
from trainer.redact import redact
from trainer.report.plots import COLORS, Curve, curves_svg, sparkline_svg
from trainer.search import DIVERGENCE, STANDARD_ERROR, is_loss, shown_scores
from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines

MOST_CURVES = len(COLORS)
#: How the page says why a prompt stopped before its steps were done.
STOPPED = {
    "early_stopping": "stopped early",
    "halving": "stopped by halving",
    "diverged": "diverged",
}
WIDE_GAP = 0.10  #: a loss of score from validation to shifted validation that is worth a warning


@dataclass
class Row:
    """One line of a task's table."""

    label: str
    kind: str  #: none, hand, trained
    scores: dict[str, float]
    color: str | None = None
    detail: str = ""
    best: bool = False
    selected: bool = False


@dataclass
class TaskReport:
    name: str
    metric: str
    columns: list[str]
    rows: list[Row]
    verdict: str
    plots: dict[str, str] = field(default_factory=dict)  #: x axis -> SVG
    left_out: int = 0
    selected: str = ""  #: the prompt to take, and why


@dataclass
class Report:
    title: str
    status: str
    ended: str
    lead: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    tasks: list[TaskReport]
    throughput: str
    data: list[dict[str, Any]]
    environment: list[tuple[str, str]]
    settings: str
    commands: list[tuple[str, str]]


def collect(output_dir: Path) -> Report:
    summary, environment = _json(output_dir, "summary.json"), _json(output_dir, "environment.json")
    run = runfile.saved(output_dir / "run.yaml")
    lines = [line for line, _ in read_lines(output_dir / METRICS_FILE) if line is not None]
    of_prompt: dict[str | None, list[Line]] = defaultdict(list)
    for line in lines:
        of_prompt[line.prompt].append(line)
    data = _data(output_dir, summary)
    tasks = [_task(task, run, summary, of_prompt) for task in run.get("tasks") or []]
    base = Path(str((run.get("base") or {}).get("model", "the base"))).name
    ended = max((line.time for line in lines), default=None)
    return Report(
        title=output_dir.resolve().name,
        status=str(summary.get("status", "unfinished")),
        ended="" if ended is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ended)),
        lead=_lead(base, run, summary),
        facts=_facts(summary, lines),
        warnings=_warnings(summary, data, tasks),
        tasks=tasks,
        throughput=_throughput(of_prompt[None]),
        data=data,
        environment=_environment(environment, summary),
        settings=redact(yaml_core.dump(run)) if run else "",
        commands=_commands(output_dir, run),
    )


def _task(
    task: dict[str, Any],
    run: dict[str, Any],
    summary: dict[str, Any],
    of_prompt: dict[str | None, list[Line]],
) -> TaskReport:
    name, metric = str(task["name"]), str(task.get("metric", "loss"))
    baselines = (summary.get("tasks") or {}).get(name) or {}
    rows = []
    if baselines.get("no_prompt"):
        rows.append(Row("no prompt", "none", _scores(baselines["no_prompt"])))
    for hard in baselines.get("hand_written") or []:
        rows.append(Row(str(hard.get("text", "")), "hand", _scores(hard), detail="hand-written"))
    results = summary.get("prompts") or {}
    for taught, scores in (baselines.get("untaught") or {}).items():
        label = f"no prompt, beside the teacher of {taught}"
        rows.append(Row(label, "none", _scores(shown_scores(scores, "distill"))))
    settings = [p for p in run.get("prompts") or [] if p.get("task") == name]
    trained = [
        Row(str(p["name"]), "trained", _scores(shown_scores(r)), detail=_detail(p, r))
        for p in settings
        for r in [results.get(p["name"]) or {}]
    ]
    distilled = [p.get("objective") == "distill" for p in settings]
    by_divergence = metric == "loss" and bool(distilled) and all(distilled)
    key = f"validation{DIVERGENCE}" if by_divergence else f"validation_{metric}"
    trained.sort(key=lambda row: _rank(row.scores.get(key), metric))
    for row, color in zip(trained, COLORS, strict=False):
        row.color = color
    rows += trained
    scored = [row for row in rows if key in row.scores]
    if scored:
        min(scored, key=lambda row: _rank(row.scores[key], metric)).best = True
    choice = (summary.get("selected") or {}).get(name) if len(trained) > 1 else None
    for row in trained:
        row.selected = choice is not None and row.label == choice["prompt"]
    columns = sorted({k for row in rows for k in row.scores}, key=_column_order)
    shown = [row for row in trained if row.color]
    curves = [Curve(row.label, str(row.color), of_prompt[row.label]) for row in shown]
    levels = _levels(rows, key, metric)
    plots = {}
    if any(curve.lines for curve in curves):
        title = "loss per target token"
        if any(distilled):
            title = "KL divergence per target token" + ("" if all(distilled) else ", or loss")
        plots = {x: curves_svg(curves, metric, levels, x, title) for x in ("step", "useful_tokens")}
    return TaskReport(
        name,
        metric,
        columns,
        rows,
        _verdict(rows, key, metric),
        plots,
        len(trained) - len(shown),
        f"Take {choice['prompt']}: {choice['why']}." if choice else "",
    )


def _levels(rows: list[Row], key: str, metric: str) -> dict[str, float]:
    """What a curve has to get over: the score without a prompt and the best hand-written one."""
    levels = {}
    none = [row.scores[key] for row in rows if row.kind == "none" and key in row.scores]
    hand = [row.scores[key] for row in rows if row.kind == "hand" and key in row.scores]
    if len(none) == 1:  # several teachers have no level in common
        levels["no prompt"] = none[0]
    if hand:
        levels["best hand-written"] = min(hand, key=lambda value: _rank(value, metric))
    return levels


def _verdict(rows: list[Row], key: str, metric: str) -> str:
    levels = _levels(rows, key, metric)
    trained = [row for row in rows if row.kind == "trained" and key in row.scores]
    if not trained:
        return "No validation score was logged for a trained prompt."
    best = min(trained, key=lambda row: _rank(row.scores[key], metric))
    score = best.scores[key]
    text = f"{best.label} reaches {number(key, score)} {spoken(key)}"
    words = {"no prompt": "no prompt", "best hand-written": "the best hand-written one"}
    compared = [f"{number(key, value)} with {words[name]}" for name, value in levels.items()]
    if compared:
        text += ", against " + " and ".join(compared)
    beaten = [
        name for name, value in levels.items() if _rank(value, metric) <= _rank(score, metric)
    ]
    if beaten:
        text += f". It is not better than {' or '.join(words[name] for name in beaten)}"
    return text + "."


def _warnings(
    summary: dict[str, Any], data: list[dict[str, Any]], tasks: list[TaskReport]
) -> list[str]:
    found = []
    if summary.get("status") == "failed":
        found.append(f"The run failed: {summary.get('error') or 'see logs/ in the output folder'}.")
    elif not summary:
        found.append("The run has no summary.json: it did not come to its end.")
    for item in data:
        if item["also_in_train"]:
            rows = [f"{here} is {there}" for here, there in item["leaked_rows"]]
            rows += ["..."] if item["also_in_train"] > len(rows) else []
            found.append(
                f"{item['task']} {item['split']}: {item['also_in_train']} of {item['rows']} rows "
                f"are also in train ({'; '.join(rows)}): on them a score is memory, not skill."
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
                f"{name}: diverged; it was stopped alone at step {end['step']}. A lower "
                "learning_rate may help."
            )
        if result.get("skipped_updates"):
            found.append(f"{name}: {result['skipped_updates']} non-finite updates were skipped.")
    for task in tasks:
        found += [w for row in task.rows if row.kind == "trained" for w in _gap(task, row)]
    return found


def _gap(task: TaskReport, row: Row) -> list[str]:
    inside = row.scores.get(f"validation_{task.metric}")
    outside = row.scores.get(f"shifted_validation_{task.metric}")
    if task.metric == "loss" or inside is None or outside is None or inside - outside < WIDE_GAP:
        return []
    return [
        f"{row.label}: {outside:.1%} on shifted rows against {inside:.1%} on validation rows; "
        "it has learned the training context more than the task. Fewer virtual tokens, fewer "
        "steps or more varied rows may help."
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
        ("time waited for data", f"{waited:.1%}" if waited is not None else None),
        ("ranks", summary.get("world_size")),
        ("base per rank", size(memory.get("base_bytes_per_rank"))),
        ("peak memory (RSS)", size(memory.get("peak_rss_bytes"))),
        ("peak GPU memory", size(memory.get("peak_gpu_bytes"))),
        ("gathered per step", size(gathered)),
        ("base loaded in", f"{load['seconds']:.1f} s" if load.get("seconds") else None),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _data(output_dir: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    counts = summary.get("data") or {}
    rows = []
    for item in _json(output_dir, "datasets.json") or []:
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
    stores = _json(output_dir, "tracking.json").get("stores") or {}
    store = next(reversed(stores), f"sqlite:///{output_dir.resolve()}/mlflow.db")
    page = (stores.get(store) or {}).get("page")
    where = f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    if store.startswith("http"):
        where = f"{store}/{page or ''}"
    elif page:
        where += f"\n# then open http://127.0.0.1:5000/{page}"
    commands.append(("Compare runs and curves in MLflow", where))
    commands.append(("Send what MLflow did not get", f"promptshard sync {folder}"))
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


def _scores(row: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if key.startswith(("validation_", "shifted_validation_"))
        and not key.endswith(STANDARD_ERROR)
        and isinstance(value, int | float)
    }


def _rank(value: float | None, metric: str) -> float:
    """Small is good, whatever the metric; a task's divergences are ranked as its losses are."""
    if value is None or value != value:
        return float("inf")
    return value if metric in LOWER_IS_BETTER else -value


def _column_order(key: str) -> tuple[bool, bool, str]:
    return is_loss(key), key.startswith("shifted_"), key


def spoken(key: str) -> str:
    return key.replace("shifted_validation_", "shifted ").replace("_", " ")


def number(key: str, value: float) -> str:
    return f"{value:.3f}" if is_loss(key) else f"{value:.1%}"


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


def _json(output_dir: Path, name: str) -> Any:
    try:
        return json.loads((output_dir / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
