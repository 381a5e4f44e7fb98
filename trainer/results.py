"""What a run writes about itself and shows: settings, environment, adapters, summary, tables."""

from __future__ import annotations

import datetime
import math
import platform
import resource
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer import atomic
from trainer.base.files import BaseFiles
from trainer.config import LOWER_IS_BETTER, PROJECT_ROOT, RunConfig, dump, resolve_path
from trainer.console import Console, clock
from trainer.engine import Engine, base_bytes
from trainer.export import save_peft
from trainer.loop import Loop
from trainer.redact import redact
from trainer.report import write_report
from trainer.revision import git_revision
from trainer.search import (
    DIVERGENCE,
    STANDARD_ERROR,
    Candidate,
    select,
    share_standard_error,
    shown_scores,
)
from trainer.sharded import LoadedBase
from trainer.tasks.feed import TaskData
from trainer.tracking.state import forget_tracking

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "safetensors", "datasets", "mlflow")


def describe_run(
    output: Path,
    config: RunConfig,
    engine: Engine,
    loaded: LoadedBase,
    tasks: Mapping[str, TaskData],
    command: str,
    *,
    begins: bool,
) -> None:
    """Write what a run is into its folder.

    Args:
        begins: it goes on from no checkpoint. Where one with other settings had begun in this
            folder, it is no part of that one's curves.
    """
    words = redact(dump(_anywhere(config)))
    if begins:
        forget_if_other(output, words)
    atomic.write(output / "run.yaml", words)
    environment = {
        "versions": versions(),
        "python": platform.python_version(),
        "world_size": engine.world_size,
        "device": device_name(engine.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "matmul": loaded.matmul,
        "host": platform.node(),
        "git_revision": git_revision(PROJECT_ROOT),
        "command": redact(command),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    atomic.write_json(output / "environment.json", environment)
    atomic.write_json(
        output / "datasets.json", [s for data in tasks.values() for s in data.sources]
    )


def forget_if_other(output: Path, words: str) -> None:
    """Where the run file says other words than one that had begun here: its curves are its own."""
    before = output / "run.yaml"
    if before.exists() and before.read_text() != words:
        forget_tracking(output)


def _anywhere(config: RunConfig) -> RunConfig:
    """The run file with the base's folder in full, so that it is found from any working folder."""
    folder = resolve_path(config.base.model)
    if not folder.is_dir():
        return config
    base = config.base.model_copy(update={"model": str(folder.resolve())})
    return config.model_copy(update={"base": base})


def measure(engine: Engine, loop: Loop, loaded: LoadedBase) -> dict[str, Any]:
    """Memory, traffic and load of all ranks; a collective."""
    on_gpu = engine.device.type == "cuda"
    mine = [
        base_bytes(loaded.model),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        engine.peak_gpu_bytes,
        loaded.stats.seconds,
        loaded.stats.bytes_read,
        loop.train_gathered_bytes,
        loop.train_exchanged_bytes,
        loop.saved_bytes_per_token,
    ]
    base, rss, gpu, seconds, read, gathered, exchanged, saved = zip(
        *engine.all_gather(mine), strict=True
    )
    steps = max(1, loop.steps_here)
    progress = loop.progress
    return {
        "throughput": {
            "useful_tokens_per_second": progress.useful_tokens / max(progress.train_seconds, 1e-9),
            "useful_tokens": progress.useful_tokens,
            "train_seconds": progress.train_seconds,
            "data_wait_share": progress.data_wait_seconds / max(progress.train_seconds, 1e-9),
        },
        "memory": {
            "base_bytes_per_rank": max(base),
            "kept_bytes_per_rank": engine.kept_bytes,
            "ranks_per_copy": loaded.placement.group_size,
            "peak_rss_bytes": max(rss),
            "peak_gpu_bytes": max(gpu) if on_gpu else None,
            "saved_bytes_per_token": max(saved),
            "saved_bytes_per_token_and_layer": max(saved) / loaded.memory.sizes.layers,
            "stream_tokens": loaded.budget.tokens,
            "gradient_checkpointing": loaded.budget.checkpointing,
        },
        "communication": {
            "gathered_bytes_per_step": max(gathered) / steps,
            "exchanged_bytes_per_step": max(exchanged) / steps,
        },
        "load": {"seconds": max(seconds), "bytes_read_per_rank": max(read)},
        "time": loop.times.summary(),
        "versions": versions(),
        "world_size": engine.world_size,
    }


def finish(
    output: Path,
    loop: Loop,
    loaded: LoadedBase,
    files: BaseFiles,
    measured: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Write adapters, summary and report."""
    config, bank = loop.config, loop.bank
    shape = {
        "num_layers": files.config.num_hidden_layers,
        "num_attention_heads": files.config.num_attention_heads,
    }
    prompts: dict[str, Any] = {}
    for k, prompt in enumerate(config.prompts):
        scores = loop.progress.scores.get(prompt.name, {})
        ended_at = loop.progress.stopped.get(prompt.name, {}).get("step", loop.progress.step)
        folder = output / "prompts" / prompt.name
        shown = shown_scores(scores, prompt.objective)
        said = ", ".join(f"{key} {value:.4f}" for key, value in shown.items())
        for where, title, virtual_tokens in (
            (folder, prompt.name, bank.best(k)),
            (folder / "last", f"{prompt.name} (last step)", bank.snapshot(k)),
        ):
            if not virtual_tokens.isfinite().all():
                console.warn(f"prompt {title!r}: its virtual tokens are not finite; not saved")
                continue
            save_peft(
                where,
                virtual_tokens,
                config.base.model,
                config.base.revision,
                title=title,
                description=f"Task {prompt.task}. {said}".strip(),
                **shape,
            )
        prompts[prompt.name] = {
            "task": prompt.task,
            "method": prompt.method,
            "objective": prompt.objective,
            "num_virtual_tokens": prompt.num_virtual_tokens,
            "best_step": loop.stopping[prompt.name].best_step or ended_at,
            "skipped_updates": loop.progress.skipped.get(prompt.name, 0),
            "stopped": loop.progress.stopped.get(prompt.name),
            **scores,
        }
    summary = {
        "status": "finished",
        "steps": loop.progress.step,
        "prompts": prompts,
        "selected": _selected(loop.tasks, prompts),
        "tasks": loop.progress.baselines,
        "data": {name: data.counts for name, data in loop.tasks.items()},
        **measured,
    }
    atomic.write_json(output / "summary.json", summary)
    try:
        with console.phase("writing the report"):
            write_report(output)
    except Exception as error:  # the results are there; a picture of them must not lose them
        console.warn(f"no report written: {type(error).__name__}: {error}")
    return summary


def _selected(tasks: Mapping[str, TaskData], prompts: Mapping[str, Any]) -> dict[str, Any]:
    """Of each task that has a score: the prompt to take, as ``search.select`` gives it."""
    found = {}
    for name, data in tasks.items():
        mine = {n: scores for n, scores in prompts.items() if scores["task"] == name}
        chosen = select(_candidates(data, mine), data.task.metric)
        if chosen is not None:
            found[name] = chosen
    return found


def _candidates(data: TaskData, prompts: Mapping[str, Any]) -> list[Candidate]:
    """The prompts of a task by its metric's validation score; a diverged one is no candidate."""
    metric = data.task.metric
    key, rows = f"validation_{metric}", data.evaluation.get("validation")
    found = []
    labelled = [name for name, scores in prompts.items() if scores["objective"] == "labels"]
    taught_by = {data.teachers[name].index for name in prompts if name in data.teachers}
    if metric in LOWER_IS_BETTER and not labelled and len(taught_by) > 1:
        return []  # how far from one teacher says nothing beside how far from another
    for name, scores in prompts.items():
        if metric in LOWER_IS_BETTER and labelled and name not in labelled:
            continue  # a divergence is no rival of a cross-entropy
        if key not in scores or (scores["stopped"] or {}).get("reason") == "diverged":
            continue
        if metric in LOWER_IS_BETTER:
            error = scores.get(f"{key}{STANDARD_ERROR}", math.nan)
        else:
            assert rows is not None
            error = share_standard_error(scores[key], len(rows.candidates))
        found.append(Candidate(name, scores["num_virtual_tokens"], scores[key], error))
    return found


def show_results(summary: Mapping[str, Any], config: RunConfig, console: Console) -> None:
    output = config.output_dir
    for task in config.tasks:
        baseline = summary["tasks"].get(task.name, {})
        metric = task.metric
        better = min if metric in LOWER_IS_BETTER else max
        columns = [f"validation_{metric}", f"shifted_validation_{metric}"]
        if metric not in LOWER_IS_BETTER:
            columns.append("validation_loss")
        columns += [f"validation{DIVERGENCE}", f"shifted_validation{DIVERGENCE}"]
        columns.append("validation_agreement")
        rows = [("no prompt", baseline.get("no_prompt", {}))]
        if baseline.get("hand_written"):
            best = better(baseline["hand_written"], key=lambda scores: scores.get(columns[0], 0.0))
            rows.append((f"hand-written: {best['text'].strip()}", best))
        rows += [
            (f"no prompt, beside the teacher of {name}", shown_scores(scores, "distill"))
            for name, scores in baseline.get("untaught", {}).items()
        ]
        rows += [
            (
                f"trained: {name} ({scores['num_virtual_tokens']} virtual tokens)",
                shown_scores(scores),
            )
            for name, scores in summary["prompts"].items()
            if scores["task"] == task.name
        ]
        shown = [column for column in columns if any(column in scores for _, scores in rows)]
        console.table(
            task.name,
            ["", *(column.replace("_", " ") for column in shown)],
            [[name, *(_number(scores.get(column)) for column in shown)] for name, scores in rows],
        )
        selected = (summary.get("selected") or {}).get(task.name)
        if selected and sum(s["task"] == task.name for s in summary["prompts"].values()) > 1:
            console.say(f"selected for {task.name}: {selected['prompt']}: {selected['why']}")
    diverged = [
        name
        for name, scores in summary["prompts"].items()
        if (scores.get("stopped") or {}).get("reason") == "diverged"
    ]
    if diverged:
        console.warn(
            f"diverged and stopped before their end: {', '.join(diverged)}; lower learning_rate"
        )
    speed = summary["throughput"]["useful_tokens_per_second"]
    console.say(
        f"{summary['steps']} steps, {speed:,.0f} useful tokens/s, adapters in {output}/prompts"
    )
    if times := summary.get("time"):
        console.say(f"time:    {_time_breakdown(times)}")
    console.say(f"report:  {output}/report.html")
    name = next(
        (found["prompt"] for found in (summary.get("selected") or {}).values()),
        next(iter(summary["prompts"])),
    )
    console.say(f'try it:  promptshard generate {output} --prompt {name} --input "..."')


def _time_breakdown(seconds: Mapping[str, float]) -> str:
    """``1:23 (start 0:10, load 0:03, ...)``; phases of less than half a second are left out."""
    parts = [
        f"{name} {clock(value)}"
        for name, value in seconds.items()
        if name != "total" and value >= 0.5
    ]
    return f"{clock(seconds['total'])} ({', '.join(parts)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
