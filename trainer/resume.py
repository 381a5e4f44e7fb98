"""Whether a run begins, goes on or is finished: checkpoints, and what must be equal to go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.base.files import BaseFiles
from trainer.config import RunConfig
from trainer.console import Console
from trainer.errors import BadInput
from trainer.loop import Loop
from trainer.tasks.feed import TaskData

#: Settings that may change when a run goes on; every other one of these sections must not.
MAY_CHANGE = {
    "training.micro_batch_tokens",
    "training.max_skipped_updates",
    "search.max_prompts",
}
#: Where files lie may change; what they hold, and what is taken of it, may not: their digests tell.
PATHS = {"model", "revision", "train", "validation", "shifted_validation"}
MUST_STAY = ("base", "tasks", "prompts", "training", "search")


def put_aside(output: Path, console: Console) -> None:
    """Move an earlier run out of the way; nothing is deleted."""
    kept = [path for path in output.iterdir() if path.name != "logs"]
    if not kept:
        return
    if not (output / "run.yaml").exists():
        raise BadInput(f"--fresh: {output} holds other things than a run; give another output_dir")
    number = 1
    while (aside := output.with_name(f"{output.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for path in kept:
        shutil.move(str(path), aside / path.name)
    console.say(f"an earlier run was put aside: {aside}")


def identity_of(
    config: RunConfig, files: BaseFiles, tasks: Mapping[str, TaskData]
) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint, by the setting's name."""
    settings = config.model_dump(mode="json")
    identity: dict[str, Any] = {}
    for section in MUST_STAY:
        for key, value in _flatten(section, settings[section]):
            if key not in MAY_CHANGE:
                identity[key] = value
    identity["base files"] = files.fingerprint
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


def find_checkpoint(output: Path, identity: Mapping[str, Any]) -> tuple[Any, Any] | None:
    saved = checkpoint.newest(output / "checkpoints")
    if saved is None:
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
    return saved.tensors, saved.state


def is_finished(output: Path) -> bool:
    try:
        summary = json.loads((output / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(summary.get("status") == "finished")


def save_checkpoint(
    output: Path, loop: Loop, identity: Mapping[str, Any], console: Console
) -> None:
    tensors, bank = loop.bank.state()
    state = {"identity": identity, "bank": bank, "loop": loop.state()}
    try:
        checkpoint.save(
            output / "checkpoints", loop.progress.step, tensors, state, loop.config.checkpoint.keep
        )
    except OSError as error:
        console.warn(f"step {loop.progress.step}: no checkpoint written: {error}; training goes on")
