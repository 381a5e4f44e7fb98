"""Find, check, load and take checkpoints of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import SavedCheckpoint, Snapshot
from trainer.checkpointing.checkpoint_names import CHECKPOINTS
from trainer.checkpointing.saved_state import problem_of
from trainer.checkpointing.state_tensors import join_tensors, split_tensors
from trainer.config import RunConfig, load
from trainer.data.task_data import TaskData
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import LoadedBase, load_base
from trainer.model.checkpoint_files import BaseFiles
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json
from trainer.runtime.redact import redact
from trainer.tracking.metrics_log import METRICS_FILE, read_lines
from trainer.training.loop import Loop

#: Sections whose settings must match on resume, except ``MAY_CHANGE``.
MUST_MATCH = ("base", "tasks", "prompts", "training", "search")
MAY_CHANGE = {
    "training.micro_batch_tokens",
    "training.max_skipped_updates",
    "search.max_prompts",
    "search.init_share",  # a resumed prompt needs no initial value
}
#: Paths may change, but not the digests of their content.
PATHS = {"model", "revision", "chat_template", "train", "validation", "shifted_validation"}
#: Settings that only ``promptshard evaluate`` reads.
NOT_TRAINED = {"paraphrases"}


#: Settings that checkpoints of earlier versions lack, and the value that their runs had. Settings
#: whose default is null need no entry.
ADDED = {"position": "front", "chat": False, "search": False, "optional": []}


def run_identity(
    config: RunConfig, base: Mapping[str, str], dtype: str, tasks: Mapping[str, TaskData]
) -> dict[str, Any]:
    """Return everything that must match for a run to resume, by the name of the setting.

    Args:
        base: digests of the base model's files, from ``fingerprint_base_on_all``.
        dtype: compute type, to which ``base.dtype`` resolves on this device.
    """
    settings = config.model_dump(mode="json")
    identity: dict[str, Any] = {}
    for section in MUST_MATCH:
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
            if key not in PATHS | NOT_TRAINED:
                yield from _flatten(f"{prefix}.{key}", inner)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from _flatten(f"{prefix}.{inner['name']}", inner)
    else:
        yield prefix, value


def find_checkpoint(
    output: Path, identity: Mapping[str, Any], console: Console
) -> SavedCheckpoint | None:
    """Return the checkpoint that a run resumes from; None if it starts from the beginning.

    Raises:
        BadInput: no checkpoint is usable, or the newest is of a different run; names every
            difference.
    """
    saved = checkpoint.newest(output / CHECKPOINTS, console.warn, problem_of)
    if saved is None:
        lines = (line for line, _ in read_lines(output / METRICS_FILE) if line is not None)
        if steps := max((line.step for line in lines), default=0):
            console.warn(
                f"{output}: {steps} step(s) were logged, but no checkpoint was saved; starting over"
            )
        return None
    _refuse_other_run(output, _with_added(saved.state["identity"], identity), identity)
    return saved


def check_finished_run(output: Path, config: RunConfig, identity: Mapping[str, Any]) -> None:
    """Check that a finished run whose checkpoints were removed has these settings and this data.

    Raises:
        BadInput: it is a different run; names every difference.
    """
    dtype = identity["base.dtype"]
    try:
        before = run_identity(load(output / "run.yaml"), {}, dtype, {})
        sources = read_json(output / "datasets.json")
    except BadInput:  # of an earlier version, or damaged
        return
    now = run_identity(config, {}, dtype, {})
    for source in sources:
        name = f"data of {source['task']}, {source['split']}"
        before[name], now[name] = source["digest"], identity.get(name)
    # run.yaml has no credentials
    other = [k for k in now if redact(str(now[k])) != redact(str(before.get(k)))]
    other += before.keys() - now.keys()
    _refuse_other_run(output, *({k: x.get(k) for k in other} for x in (before, now)))


def _refuse_other_run(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    problems = [
        f"{key}: is {now.get(key)!r}, but the run in {output} started with {before.get(key)!r}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]
    if problems:
        remedy = f"{output}: give another output_dir, or use --fresh to archive that run"
        raise BadInput([*problems, remedy])


def _with_added(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved identity with the settings of ``ADDED`` that it lacks."""
    names = {key: key.rpartition(".")[2] for key in now.keys() - before.keys()}
    return {**before, **{key: ADDED[name] for key, name in names.items() if name in ADDED}}


def saved_positions(output: Path, config: RunConfig) -> dict[str, str]:
    """Return ``position`` of each prompt in the run's newest checkpoint; empty without one.

    Runs of earlier versions keep ``front``, which was the default before ``auto``.
    """
    if all(prompt.position != "auto" for prompt in config.prompts):
        return {}
    saved = checkpoint.newest(output / CHECKPOINTS, lambda _: None, problem_of)
    before = saved.state["identity"] if saved else {}
    keys = {prompt.name: f"prompts.{prompt.name}" for prompt in config.prompts}
    return {
        name: before.get(f"{key}.position", ADDED["position"])
        for name, key in keys.items()
        if f"{key}.task" in before
    }


def take_run_snapshot(
    loop: Loop, loaded: LoadedBase, identity: Mapping[str, Any], conditions: Mapping[str, Any]
) -> Snapshot:
    """Copy everything that a checkpoint holds; ``conditions`` are from ``choice_conditions``."""
    tensors, prompts = split_tensors(loop.bank.state_dict())
    budget = loaded.budget
    choices = {
        "matmul": loaded.matmul,
        "shard_group": loaded.placement.group_size,
        "kept_bytes": loaded.placement.kept_bytes,
        "stream_tokens": budget.tokens,
        "ramp": list(budget.ramp),
        "gradient_checkpointing": budget.checkpointing,
    }
    state = {
        "identity": identity,
        "bank": {"prompts": prompts},
        "loop": loop.state_dict(),
        "chosen": {"where": conditions, **choices},
    }
    return checkpoint.take_snapshot(loop.progress.step, tensors, state)


def choice_conditions(config: RunConfig, device: str, world_size: int) -> dict[str, Any]:
    """Return the conditions under which the automatic choices of a run are valid again."""
    return {
        "device": device,
        "world_size": world_size,
        "micro_batch_tokens": config.training.micro_batch_tokens,
        "gradient_checkpointing": config.engine.gradient_checkpointing,
        "shard_group": config.engine.shard_group,
        "base_memory": config.engine.base_memory,
    }


def load_run_state(loop: Loop, saved: SavedCheckpoint) -> None:
    """Continue from a checkpoint.

    Raises:
        BadInput: the checkpoint is of another run, or its state is damaged but passed all checks.
    """
    try:
        prompts = join_tensors(saved.tensors, saved.state["bank"]["prompts"])
        loop.bank.load_state_dict(prompts)
        loop.load_state_dict(saved.state["loop"])
    except BadInput:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(
            f"{saved.path}: its state is damaged ({type(error).__name__}: {error}); remove this "
            "folder to resume from an older checkpoint, or use --fresh to start over"
        ) from error


def load_base_as_saved(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    lengths: Sequence[int],
    saved: SavedCheckpoint | None,
    conditions: Mapping[str, Any],
) -> LoadedBase:
    """Load the base, with the automatic choices of a checkpoint if the conditions are the same.

    Args:
        conditions: from ``choice_conditions``.
    """
    choices = None if saved is None else saved_choices(saved, conditions)
    if choices is None:
        return load_base(engine, files, config, console, lengths=lengths)
    loaded = load_base(
        engine,
        files,
        apply_choices(config, choices),
        console,
        lengths=lengths,
        kept_bytes=choices["kept_bytes"],
    )
    loaded.budget.ramp = list(choices["ramp"])
    return loaded


def saved_choices(saved: SavedCheckpoint, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the saved values of ``auto`` settings; None if the conditions have changed.

    These values depend on free memory and measured speed, which differ between starts, and they
    determine the order of floating-point sums: a resumed run is bit-identical only with the same
    values.
    """
    choices: dict[str, Any] = saved.state["chosen"]
    return choices if choices["where"] == conditions else None


def apply_choices(config: RunConfig, choices: Mapping[str, Any]) -> RunConfig:
    """Replace the ``auto`` settings of a run file by saved choices."""
    base = config.base.model_copy(update={"matmul": choices["matmul"]})
    engine = config.engine.model_copy(
        update={k: choices[k] for k in ("gradient_checkpointing", "shard_group")}
    )
    training = config.training.model_copy(update={"micro_batch_tokens": choices["stream_tokens"]})
    return config.model_copy(update={"base": base, "engine": engine, "training": training})
