"""Whether a run starts, resumes or is finished: checkpoints, and what must be equal to resume."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import SavedCheckpoint, Snapshot
from trainer.checkpointing.checkpoint_names import CHECKPOINTS
from trainer.checkpointing.run_lock import LOCK
from trainer.checkpointing.saved_state import problem_of
from trainer.config import RunConfig
from trainer.data.task_data import TaskData
from trainer.distributed.model_loading import LoadedBase
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object
from trainer.tracking.metrics_log import METRICS_FILE, SYSTEM_FILE, read_lines
from trainer.training.loop import Loop

#: Settings that may change when a run is resumed; every other one of these sections must not.
MAY_CHANGE = {
    "training.micro_batch_tokens",
    "training.max_skipped_updates",
    "search.max_prompts",
    "search.init_share",  # a resumed prompt needs no initial value
}
#: Where files lie may change; what they hold, and what is taken of it, may not: their digests tell.
PATHS = {"model", "revision", "train", "validation", "shifted_validation"}
#: The Slurm job that has put an earlier run aside.
PUT_ASIDE_BY = Path("logs", "put-aside-by-job")
#: In a folder that an earlier run is being moved to.
MOVING = ".moving"
MUST_STAY = ("base", "tasks", "prompts", "training", "search")


def was_put_aside(output: Path) -> bool:
    """Whether this Slurm job, before it was requeued, has put an earlier run aside already."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    try:
        return (output / PUT_ASIDE_BY).read_text() == job
    except OSError:
        return False


def put_aside(output: Path, console: Console) -> None:
    """Move an earlier run out of the way; nothing is deleted."""
    kept = [path for path in output.iterdir() if path.name not in ("logs", LOCK)]
    if kept:
        _move_aside(output, kept, console)
    if job := os.environ.get("SLURM_JOB_ID"):
        (output / PUT_ASIDE_BY).parent.mkdir(exist_ok=True)
        atomic_io.write(output / PUT_ASIDE_BY, job)


def _move_aside(output: Path, kept: Sequence[Path], console: Console) -> None:
    """Move files into ``OUTPUT.N``; called again after it was killed, it moves the rest.

    ``run.yaml`` is moved last: until then the folder counts as one of a run.
    """
    if not (output / "run.yaml").exists():
        raise BadInput(f"--fresh: {output} holds other things than a run; give another output_dir")
    kept = sorted(kept, key=lambda path: path.name == "run.yaml")
    measured = output / SYSTEM_FILE  # other logs are open, of this very start
    number = 1
    while (aside := output.with_name(f"{output.name}.{number}")).exists():
        if (aside / MOVING).exists() and not any((aside / path.name).exists() for path in kept):
            break
        number += 1
    aside.mkdir(exist_ok=True)
    (aside / MOVING).touch()
    if measured.exists():
        (aside / SYSTEM_FILE).parent.mkdir(exist_ok=True)
        shutil.move(str(measured), aside / SYSTEM_FILE)
    for path in kept:
        shutil.move(str(path), aside / path.name)
    (aside / MOVING).unlink()
    console.say(f"moved an earlier run to {aside}")


def identity_of(
    config: RunConfig, base: Mapping[str, str], dtype: str, tasks: Mapping[str, TaskData]
) -> dict[str, Any]:
    """What must be equal for a run to resume from a checkpoint, by the setting's name.

    Args:
        base: digests of its parts, as ``sharded.identity_of`` gives them.
        dtype: what ``base.dtype`` stands for here.
    """
    settings = config.model_dump(mode="json")
    identity: dict[str, Any] = {}
    for section in MUST_STAY:
        for key, value in _flatten(section, settings[section]):
            if key not in MAY_CHANGE:
                identity[key] = value
    identity |= base
    identity["base.dtype"] = dtype
    for name, data in tasks.items():
        for source in data.sources:
            identity[f"data of {name}, {source['split']}"] = source["digest"]
    return identity


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in PATHS:
                yield from _flatten(f"{prefix}.{key}", inner)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from _flatten(f"{prefix}.{inner['name']}", inner)
    else:
        yield prefix, value


def find_checkpoint(
    output: Path, identity: Mapping[str, Any], console: Console
) -> SavedCheckpoint | None:
    """Find the checkpoint that a run resumes from; None if it starts.

    Raises:
        BadInput: if no checkpoint can be used, or the newest is of another run: what differs.
    """
    saved = checkpoint.newest(output / CHECKPOINTS, console.warn, problem_of)
    if saved is None:
        if done := _steps_logged(output):
            console.warn(
                f"{output}: {done} step(s) were logged, but there is no checkpoint of them; "
                "starting over"
            )
        return None
    before = saved.state["identity"]
    problems = [
        f"{key}: is {identity.get(key)!r}, but {output} was begun with {before.get(key)!r}"
        for key in sorted(identity.keys() | before.keys())
        if identity.get(key) != before.get(key)
    ]
    if problems:
        raise BadInput(
            [*problems, f"{output}: give another output_dir, or --fresh to put that run aside"]
        )
    return saved


def _steps_logged(output: Path) -> int:
    lines = (line for line, _ in read_lines(output / METRICS_FILE) if line is not None)
    return max((line.step for line in lines), default=0)


def finished_summary(output: Path) -> dict[str, Any] | None:
    """Read ``summary.json`` of a run that has finished; None otherwise, or where it is damaged.

    A run whose summary is damaged resumes from its last checkpoint and writes it again.
    """
    try:
        summary = read_json_object(output / "summary.json")
    except BadInput:
        return None
    if summary.get("status") != "finished":
        return None
    sections = [summary.get(key) for key in ("prompts", "tasks", "throughput")]
    whole = all(isinstance(section, dict) for section in sections) and bool(summary["prompts"])
    return summary if whole and isinstance(summary.get("steps"), int) else None


def snapshot(
    loop: Loop, loaded: LoadedBase, identity: Mapping[str, Any], where: Mapping[str, Any]
) -> Snapshot:
    """All that a checkpoint holds.

    Args:
        where: ``where_of`` the run.
    """
    tensors, bank = loop.bank.state()
    budget = loaded.budget
    chosen = {
        "matmul": loaded.matmul,
        "shard_group": loaded.placement.group_size,
        "kept_bytes": loaded.placement.kept_bytes,
        "stream_tokens": budget.tokens,
        "ramp": list(budget.ramp),
        "gradient_checkpointing": budget.checkpointing,
    }
    state = {
        "identity": identity,
        "bank": bank,
        "loop": loop.state(),
        "chosen": {"where": where, **chosen},
    }
    return checkpoint.snapshot(loop.progress.step, tensors, state)


def where_of(config: RunConfig, device: str, world_size: int) -> dict[str, Any]:
    """What the run's own choices hold for: the device, the ranks, and what the run file leaves."""
    return {
        "device": device,
        "world_size": world_size,
        "micro_batch_tokens": config.training.micro_batch_tokens,
        "gradient_checkpointing": config.engine.gradient_checkpointing,
        "shard_group": config.engine.shard_group,
        "base_memory": config.engine.base_memory,
    }


def chosen_before(saved: SavedCheckpoint, where: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``auto`` came to before, where all is as it was then; else None.

    It follows from free memory and from measured speed, which differ from start to start, and
    decides in which order numbers are summed up: a run resumes bit by bit only with the same.
    """
    chosen: dict[str, Any] = saved.state["chosen"]
    return chosen if chosen["where"] == where else None


def as_chosen(config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """The run file with that in the place of ``auto``."""
    base = config.base.model_copy(update={"matmul": chosen["matmul"]})
    engine = config.engine.model_copy(
        update={k: chosen[k] for k in ("gradient_checkpointing", "shard_group")}
    )
    training = config.training.model_copy(update={"micro_batch_tokens": chosen["stream_tokens"]})
    return config.model_copy(update={"base": base, "engine": engine, "training": training})
