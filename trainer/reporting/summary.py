"""What a run writes about itself and shows: settings, environment, adapters, summary, tables."""

from __future__ import annotations

import datetime
import platform
import resource
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from trainer.config import PROJECT_ROOT, RunConfig, dump
from trainer.data.task_data import TaskData
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import LoadedBase
from trainer.distributed.zero3_sharder import base_bytes
from trainer.evaluation.result_table import ResultRow, TaskTable, task_tables
from trainer.evaluation.score_format import column_title, format_score, score_text, shown_scores
from trainer.evaluation.selection import select
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.model.checkpoint_files import BaseFiles, portable_name
from trainer.prompts.peft_adapter import save_peft
from trainer.reporting.comparison import compare
from trainer.reporting.html import write_report
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.git_revision import git_revision
from trainer.runtime.phase_times import breakdown
from trainer.runtime.redact import redact
from trainer.tracking.progress_file import forget_tracking
from trainer.training.loop import Loop

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
        begins: the run does not resume. If a run with other settings began in this folder, its
            curves are kept apart.
    """
    words = redact(dump(_anywhere(config)))
    if begins:
        forget_if_other(output, words)
    atomic_io.write(output / "run.yaml", words)
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
    atomic_io.write_json(output / "environment.json", environment)
    atomic_io.write_json(
        output / "datasets.json", [s for data in tasks.values() for s in data.sources]
    )


def forget_if_other(output: Path, words: str) -> None:
    """Forget the MLflow run of the folder if the run file differs from the one that began there."""
    before = output / "run.yaml"
    if before.exists() and before.read_text() != words:
        forget_tracking(output)


def _anywhere(config: RunConfig) -> RunConfig:
    """The run file with the base's folder in full, so that it is found from any working folder."""
    base = config.base.model_copy(update={"model": portable_name(config.base)})
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
        shown = shown_scores(scores, prompt.objective == "distill")
        num_rows = _num_rows(loop.tasks[prompt.task])
        described = ", ".join(
            f"{key.replace('_', ' ')} {score_text(shown, key, num_rows)}"
            for key in shown
            if not key.endswith(STANDARD_ERROR)
        )
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
                portable_name(config.base),
                config.base.revision,
                title=title,
                description=f"Task {prompt.task}. {described}".strip(),
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
    summary: dict[str, Any] = {
        "status": "finished",
        "steps": loop.progress.step,
        "prompts": prompts,
        "tasks": {
            name: loop.progress.baselines.get(name, {}) | {"rows": _num_rows(data)}
            for name, data in loop.tasks.items()
        },
        "data": {name: data.counts for name, data in loop.tasks.items()},
        **measured,
    }
    run = config.model_dump(mode="json")
    with console.phase("comparing prompts with baselines"):
        for table in task_tables(run, summary):
            summary["tasks"][table.task]["comparison"] = compare(output, table)
    tables = task_tables(run, summary)
    choices = {table.task: _selected(table) for table in tables}
    summary["selected"] = {task: choice for task, choice in choices.items() if choice}
    atomic_io.write_json(output / "summary.json", summary)
    try:
        with console.phase("writing the report"):
            write_report(output)
    except Exception as error:  # the results are there; a picture of them must not lose them
        console.warn(f"no report written: {type(error).__name__}: {error}")
    return summary


def _num_rows(data: TaskData) -> dict[str, int]:
    """Scored rows of each split."""
    return {split: len(rows.candidates) for split, rows in data.evaluation.items()}


def _selected(table: TaskTable) -> dict[str, Any] | None:
    """The best prompt of a task and why, and a shorter one that is nearly as good, as advice.

    None if no prompt of the task has a score to rank.
    """
    found = select(table.prompts, table.metric, table.standard_error)
    if found is None:
        return None
    best, shorter = found
    key = f"validation_{table.metric}"
    choice = {"prompt": best.name, "metric": table.metric, "score": best.scores[key]}
    choice |= {"num_virtual_tokens": best.num_virtual_tokens, "why": _why(table, best)}
    choice["shorter"] = shorter and {
        "prompt": shorter.name,
        "score": shorter.scores[key],
        "num_virtual_tokens": shorter.num_virtual_tokens,
    }
    return choice


def _why(table: TaskTable, best: ResultRow) -> str:
    column = table.column(best)
    score = f"validation {column_title(column)} {table.cell(best, column)}"
    if len(table.prompts) == 1:
        return f"the only prompt: {score}"
    text = f"best of {len(table.prompts)} prompts: {score}"
    if best.eliminated:
        text += "; halving eliminated it, but no other prompt is left"
    second = next((row for row in table.prompts if row.name != best.name and row.ranked), None)
    if second is None or second.shown.get(column) != best.shown.get(column):
        return text
    return f"{text}; {second.name} has the same {column_title(column)}"


def show_results(summary: Mapping[str, Any], config: RunConfig, console: Console) -> None:
    """Print the results of a run that has finished: a table for each task, and what to do next."""
    output = config.output_dir
    tables = task_tables(config.model_dump(mode="json"), summary)
    for table in tables:
        console.print(f"{table.task}: {table.verdict}" if len(tables) > 1 else table.verdict)
    for table in tables:
        _show_table(table, (summary.get("selected") or {}).get(table.task), console)
    diverged = [row.name for table in tables for row in table.prompts if row.diverged]
    if diverged:
        console.warn(f"diverged and stopped early: {', '.join(diverged)}; lower learning_rate")
    speed = summary["throughput"]["useful_tokens_per_second"]
    console.print(
        f"{summary['steps']} steps, {speed:,.0f} useful tokens/s; adapters in {output}/prompts, "
        f"predictions in {output}/predictions"
    )
    if times := summary.get("time"):
        console.print(f"time:    {breakdown(times)}")
    console.print(f"report:  {output}/report.html")
    name = next(
        (found["prompt"] for found in (summary.get("selected") or {}).values()),
        next(iter(summary["prompts"])),
    )
    console.print(
        f'try it:  promptshard generate {quote(output)} --prompt {quote(name)} --input "..."'
    )


def _show_table(table: TaskTable, choice: Mapping[str, Any] | None, console: Console) -> None:
    console.table(
        f"{table.task} ({table.counts})" if table.counts else table.task,
        ["", *map(column_title, table.columns)],
        [
            [_label(row), *(table.cell(row, column) for column in table.columns)]
            for row in table.rows
        ],
    )
    if choice is None or len(table.prompts) == 1:
        return
    console.print(f"best prompt for {table.task}: {choice['prompt']} ({choice['why']})")
    if shorter := choice.get("shorter"):
        key = table.column(table.prompts[0])
        console.print(
            f"a shorter prompt within one standard error: {shorter['prompt']}, "
            f"{shorter['num_virtual_tokens']} virtual tokens, "
            f"{format_score(key, shorter['score'])}"
        )


def _label(row: ResultRow) -> str:
    """A row's first cell: what it is, how long, and whether it is the best."""
    return ", ".join(filter(None, [row.short_label, row.detail, row.tag]))


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
