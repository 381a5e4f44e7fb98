"""Write the files that describe a run, and measure its memory, traffic and speed."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.config import PROJECT_ROOT, RunConfig, dump
from trainer.config.yaml_source import saved
from trainer.data.task_data import TaskData
from trainer.distributed.deepspeed_engine import Engine, device_name
from trainer.distributed.model_loading import LoadedBase
from trainer.distributed.zero3_sharder import base_bytes
from trainer.model.checkpoint_files import portable
from trainer.runtime import atomic_io
from trainer.runtime.git_revision import git_revision
from trainer.runtime.process import START_OPTIONS
from trainer.runtime.redact import redact
from trainer.tracking.progress_file import ProgressFile, forget_tracking
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
    """Write ``run.yaml``, ``environment.json`` and ``datasets.json``.

    If the run ``begins``, that is, does not resume, it gets a new MLflow run unless an earlier run
    in this folder had the same settings and data. A run that resumes in a copy of its folder gets
    one, too.
    """
    settings = redact(dump(config.model_copy(update={"base": portable(config.base)})))
    sources = json.dumps([s for data in tasks.values() for s in data.sources], indent=2) + "\n"
    if begins:
        forget_if_other(output, {"run.yaml": settings, "datasets.json": sources})
    else:
        forget_if_copied(output)
    atomic_io.write(output / "run.yaml", settings)
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
        "start_options": os.environ.get(START_OPTIONS),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    atomic_io.write_json(output / "environment.json", environment)
    atomic_io.write(output / "datasets.json", sources)


def forget_if_other(output: Path, files: Mapping[str, str]) -> None:
    """Forget the folder's MLflow run if a file there differs from these contents, by name."""
    before = {name: output / name for name in files if (output / name).exists()}
    if any(path.read_text() != files[name] for name, path in before.items()):
        forget_tracking(output)


def forget_if_copied(output: Path) -> None:
    """Forget the folder's MLflow run if it is that of a folder that this one is a copy of."""
    source = Path(str(saved(output / "run.yaml").get("output_dir", output)))
    if not source.is_dir() or source.samefile(output):
        return
    if ProgressFile(source).output_id == ProgressFile(output).output_id:
        forget_tracking(output)


def measure(engine: Engine, loop: Loop, loaded: LoadedBase) -> dict[str, Any]:
    """Measure throughput, memory, traffic and load time over all ranks; a collective.

    Returns:
        Fields of ``RunSummary``: ``throughput``, ``memory``, ``communication``, ``load``, ``time``,
        ``rank_seconds``, ``versions`` and ``world_size``. Bytes are None without a step: a run may
        only have had its results left to write.
    """
    mine = [
        base_bytes(loaded.model),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        engine.peak_gpu_bytes,
        loaded.stats.seconds,
        loaded.stats.bytes_read,
        loop.accounting.gathered_bytes,
        loop.accounting.exchanged_bytes,
        loop.memory.saved_bytes_per_token,
        loop.accounting.cpu_seconds,
    ]
    base, rss, gpu, seconds, read, gathered, exchanged, saved, cpu = zip(
        *engine.all_gather(mine), strict=True
    )
    steps, progress = loop.accounting.steps, loop.progress
    train_seconds = max(progress.train_seconds, 1e-9)
    return {
        "throughput": {
            "useful_tokens_per_second": progress.useful_tokens / train_seconds,
            "useful_tokens": progress.useful_tokens,
            "train_seconds": progress.train_seconds,
            "data_wait_share": progress.data_wait_seconds / train_seconds,
            "cpu_seconds_per_step": max(cpu) / (steps - 1) if steps > 1 else None,
        },
        "memory": {
            "base_bytes_per_rank": max(base),
            "kept_bytes_per_rank": engine.kept_bytes,
            "ranks_per_copy": loaded.placement.group_size,
            "peak_rss_bytes": max(rss),
            "peak_gpu_bytes": max(gpu) if engine.device.type == "cuda" else None,
            "saved_bytes_per_token": max(saved) if steps else None,
            "saved_bytes_per_token_and_layer": (
                max(saved) / loaded.memory.sizes.layers if steps else None
            ),
            "stream_tokens": loaded.budget.tokens,
            "gradient_checkpointing": loaded.budget.checkpointing,
        },
        "communication": {
            "gathered_bytes_per_step": max(gathered) / steps if steps else None,
            "exchanged_bytes_per_step": max(exchanged) / steps if steps else None,
        },
        "load": {"seconds": max(seconds), "bytes_read_per_rank": max(read)},
        "time": loop.times.summary(),
        "rank_seconds": loop.accounting.rank_seconds,
        "versions": versions(),
        "world_size": engine.world_size,
    }


def versions() -> dict[str, str]:
    """Versions of the installed packages of ``PACKAGES``."""
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
