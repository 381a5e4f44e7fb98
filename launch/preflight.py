"""Check inputs before any process starts, within seconds and without importing torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch import messages
from trainer.checkpointing.checkpoint_names import checkpoint_names
from trainer.config import (
    Base,
    RunConfig,
    expand_path,
    load,
    load_output,
    load_shards,
    resolve_path,
    sweeps,
)
from trainer.prompts.saved_prompts import source_problems
from trainer.runtime import log_folder
from trainer.runtime.cache_dir import cache_dir
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput, did_you_mean
from trainer.runtime.json_file import read_json_object
from trainer.runtime.stdio import open_private


def check_run(
    run_file: str, overrides: Sequence[str], printed: set[str] | None = None
) -> RunConfig:
    """Load a run file and check its base model, DeepSpeed policy, data and output folder.

    Args:
        printed: notes about the data that were printed before and are not repeated.

    Raises:
        BadInput: with all problems; if the run file itself is invalid, only with its problems.
    """
    config = check_config(load(run_file, overrides), printed=printed)
    for name, prompts in sweeps(run_file, overrides).items():
        shown = ", ".join(prompts if len(prompts) < 6 else [*prompts[:3], "...", prompts[-1]])
        messages.note(f"sweep of {name!r}: {len(prompts)} prompts: {shown}")
    return config


def check_config(
    config: RunConfig, *, trains: bool = True, printed: set[str] | None = None
) -> RunConfig:
    """Check files and data of a loaded run file; initial prompts only if ``trains``."""
    printed = set() if printed is None else printed
    problems = [*_base(config), *_policy(config), *_output(config)]
    # a run that resumes from a checkpoint does not read initial prompts
    if trains and not checkpoint_names(Path(config.output_dir)):
        problems += source_problems(config)
    notes: list[str] = []
    try:
        from trainer.data.splits import check_rows  # loads Arrow only where rows are read

        with Console(sys.stderr, sys.stderr).reading() as on_rows:
            notes = check_rows(config, on_rows=on_rows)
    except BadInput as error:
        problems += error.problems
    if problems:
        raise BadInput(problems)
    for text in [*(config.notes if trains else []), *notes]:
        if text not in printed:
            messages.note(text)
            printed.add(text)
    return config


def check_paths(config: RunConfig) -> None:
    """Raise ``BadInput`` for files of a loaded run file that do not exist; reads no rows."""
    from trainer.data.data_files import find_files  # loads Arrow only where rows are read

    problems = [*_base(config), *_policy(config), *_output(config)]
    for task in config.tasks:
        for split in ("train", "validation", "shifted_validation"):
            for source in getattr(task, split) or []:
                try:
                    find_files(source, f"tasks.{task.name}.{split}", split)
                except BadInput as error:
                    problems += error.problems
    if problems:
        raise BadInput(problems)


def check_result(run_dir: str, prompt: str | None = None) -> RunConfig:
    """Load the resolved run file of an output folder and check that ``prompt`` was trained."""
    check_folder(run_dir)
    if not is_run_dir(run_dir):
        raise BadInput(f"{run_dir} has no run.yaml; give the output_dir of a run")
    config = load(Path(run_dir) / "run.yaml")
    if prompt is None:
        return config
    names = [item.name for item in config.prompts]
    if prompt not in names:
        hint = did_you_mean(prompt, names)
        raise BadInput(
            f"--prompt: {prompt!r} is not a prompt of {run_dir}{hint}; known: {', '.join(names)}"
        )
    if not os.path.isdir(Path(run_dir) / "prompts" / prompt):
        raise BadInput(f"{run_dir}: prompt {prompt!r} is not saved yet; finish the run first")
    return config


def check_folder(run_dir: str) -> None:
    """Raise ``BadInput`` unless the folder exists."""
    if not os.path.isdir(run_dir):
        raise BadInput(f"{run_dir}: no such folder; give the output_dir of a run")


def check_target(target: str, overrides: Sequence[str]) -> RunConfig | Base:
    """Load the target of ``inspect``: a run file, an output folder, or a base model.

    Raises:
        BadInput: the target is none of these, or has problems.
    """
    path = Path(target)
    if is_run_dir(target):
        return check_config(load_output(path, overrides), trains=False)
    is_file = os.path.isfile(path) and path.suffix != ".gguf"
    if is_file or path.suffix in (".yaml", ".yml"):
        return check_run(target, overrides)
    folder = resolve_path(target)
    if os.path.isdir(folder) and not (folder / "config.json").is_file():
        raise BadInput(
            f"{target}: has neither a run.yaml (the output folder of a run) nor a config.json "
            "(a model's folder); give a run file, a run's folder, or a model's folder or hub id"
        )
    if not os.path.exists(folder) and _looks_local(target):
        raise BadInput(
            f"{target}: no such file or folder; give a run file, a run's folder, or a model's "
            "folder or hub id"
        )
    return load_shards(target, overrides)


def is_run_dir(target: str) -> bool:
    """Whether a folder is the output folder of a run."""
    return os.path.isfile(Path(target) / "run.yaml")


def check_new_file(path: Path) -> Path:
    """Return the absolute path of an output file after checking that it can be written."""
    try:
        path = Path(expand_path(str(path))).absolute()
    except ValueError as error:
        raise BadInput(f"--json: {error}") from None
    if path.is_dir():
        raise BadInput(f"--json: {path} is a folder; name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInput(f"--json: cannot write into {path.parent}; name an existing folder")
    return path


def measurements_folder(run_dir: str) -> Path:
    """Return the folder for the results of a run's evaluation; say so if it is not the run's."""
    folder = log_folder.measurements_folder(Path(run_dir))
    if folder != Path(run_dir):
        messages.note(f"{run_dir} cannot be written; results are written to {folder}")
    return folder


def open_log(logs: Path, name: str) -> Path:
    """Create a log file that only its owner may read; return its path."""
    log = logs / name
    setting = "PROMPTSHARD_CACHE" if logs.is_relative_to(cache_dir("")) else "output_dir"
    with writing(logs, setting):
        logs.mkdir(parents=True, exist_ok=True)
        os.close(open_private(log))
    return log


@contextmanager
def writing(folder: str | Path, setting: str = "output_dir") -> Iterator[None]:
    """Raise ``BadInput`` if writing to the folder fails in the ``with`` block."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"{setting}: cannot write to {folder}: {error.strerror}; choose a folder that you can "
            "write to"
        ) from None


def _base(config: RunConfig) -> Iterator[str]:
    """Yield problems of a base model that is a path; other names may be hub ids."""
    name = config.base.model
    folder = resolve_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            yield f"base.model: {name} is not a model folder (no config.json)"
        else:
            yield from _model_config(folder, name)
    elif folder.exists():
        if folder.suffix != ".gguf":
            yield f"base.model: {name} is a file; give its folder"
        else:
            yield from _gguf(folder, name)
    elif _looks_local(name):
        yield f"base.model: {name}: no such folder; give a model's folder or a hub id"
    if config.base.chat_template is not None:
        from trainer.model.chat_template_file import read_chat_template  # imports jinja2

        try:
            read_chat_template(config.base.chat_template)
        except BadInput as error:
            yield from error.problems


def _model_config(folder: Path, name: str) -> Iterator[str]:
    """Yield the reason if a model's family or the format of its weights is not supported."""
    from trainer.model.quantization_config import quantization_problem
    from trainer.model.unsupported_families import unsupported_family

    try:
        config = read_json_object(folder / "config.json")
    except BadInput as error:
        yield from error.problems
        return
    if unsupported := unsupported_family(config, name):
        yield unsupported
    for section in (config, config.get("text_config")):
        method = section.get("quantization_config") if isinstance(section, dict) else None
        problem = quantization_problem(method, name) if isinstance(method, dict) else None
        if problem:
            yield problem


def _gguf(path: Path, name: str) -> Iterator[str]:
    """Yield the reason if a GGUF file cannot be read."""
    from trainer.model.gguf_header import read_gguf_header  # imports numpy

    try:
        read_gguf_header(path, name)
    except BadInput as error:
        yield from error.problems


def _looks_local(name: str) -> bool:
    """Whether a name that is not a folder looks like a path and not like a hub id."""
    first = Path(os.path.expanduser(name)).parts[:1]
    shaped = name.startswith((".", "/", "~")) or name.count("/") > 1
    return shaped or bool(first and os.path.isdir(resolve_path(first[0])))


def _policy(config: RunConfig) -> Iterator[str]:
    name = config.engine.deepspeed
    path = resolve_path(name)
    if not path.is_file():
        yield f"engine.deepspeed: {name}: no such file; use ds_configs/zero3.json"
        return
    try:
        read_json_object(path)
    except BadInput as error:
        yield from (f"engine.deepspeed: {problem}" for problem in error.problems)


def _output(config: RunConfig) -> Iterator[str]:
    path = Path(config.output_dir).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        yield f"output_dir: {config.output_dir}: {nearest} is a file; choose another folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield f"output_dir: {config.output_dir}: {nearest} is not writable; choose another folder"
