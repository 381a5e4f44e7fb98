"""What can be found wrong before any process starts, in seconds and without torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import messages
from trainer.config import RunConfig, load, resolve_path
from trainer.console import Console
from trainer.errors import BadInput, did_you_mean


def check_run(run_file: str, overrides: Sequence[str]) -> RunConfig:
    """Load a run file and look at all that it names: base, policy, rows, output folder.

    Raises:
        BadInput: with every problem found; those of the run file first, as they hide the others.
    """
    config = load(run_file, overrides)
    problems = [*_base(config), *_policy(config), *_output(config)]
    notes: list[str] = []
    try:
        notes = _rows(config)
    except BadInput as error:
        problems += error.problems
    if problems:
        raise BadInput(problems)
    for text in notes:
        messages.note(text)
    return config


def check_result(run_dir: str, prompt: str | None = None) -> RunConfig:
    """Load the resolved run file of an output folder, and see that it holds ``prompt``."""
    saved = Path(run_dir) / "run.yaml"
    if not Path(run_dir).is_dir():
        raise BadInput(f"{run_dir}: no such folder; give the output_dir of a run")
    if not saved.is_file():
        raise BadInput(f"{run_dir}: has no run.yaml, so it is not the output folder of a run")
    config = load(saved)
    names = [item.name for item in config.prompts]
    if prompt is not None and prompt not in names:
        hint = did_you_mean(prompt, names)
        raise BadInput(
            f"--prompt: {prompt!r} is not a prompt of {run_dir}{hint}; known: {', '.join(names)}"
        )
    if prompt is not None and not (Path(run_dir) / "prompts" / prompt).is_dir():
        raise BadInput(
            f"{run_dir}: prompt {prompt!r} is not saved yet; train the run to its end first"
        )
    return config


def open_log(output_dir: str, name: str) -> Path:
    """The path of a log file under ``output_dir``, its folder made."""
    folder = Path(output_dir).expanduser() / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        raise BadInput(f"output_dir: cannot write to {output_dir}: {error.strerror}") from None
    return folder / name


def _base(config: RunConfig) -> Iterator[str]:
    """A base that must be a folder but is none. Anything else may be a hub id."""
    name = config.base.model
    folder = resolve_path(name)
    first = Path(name).expanduser().parts[:1]
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            yield f"base.model: {name} has no config.json, so it is not a model's folder"
    elif folder.exists():
        yield f"base.model: {name} is a file; name the folder it is in"
    elif looks_local or (first and resolve_path(first[0]).is_dir()):
        yield f"base.model: {name}: no such folder; give a model's folder or a hub id"


def _policy(config: RunConfig) -> Iterator[str]:
    name = config.engine.deepspeed
    try:
        policy = json.loads(resolve_path(name).read_text(encoding="utf-8"))
    except OSError:
        yield f"engine.deepspeed: {name}: no such file; use ds_configs/zero3.json"
    except ValueError as error:
        yield f"engine.deepspeed: {name} is not valid JSON: {error}"
    else:
        if not isinstance(policy, dict):
            yield f"engine.deepspeed: {name}: a DeepSpeed policy is a JSON object"


def _output(config: RunConfig) -> Iterator[str]:
    """The nearest folder that exists must take new files."""
    path = Path(config.output_dir).expanduser().absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        yield f"output_dir: {config.output_dir}: {nearest} is a file; choose another folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield f"output_dir: {config.output_dir}: {nearest} is not writable; choose another folder"


def _rows(config: RunConfig) -> list[str]:
    """Check every row; what is worth knowing about them."""
    from trainer.tasks.rows import check_rows  # loads Arrow only where rows are read

    with Console(sys.stderr, sys.stderr).reading() as said:
        return check_rows(config, said=said)
