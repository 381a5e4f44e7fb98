"""Files of a registered prompt: an MLflow model that names its base and does not contain it.

    MLmodel                      flavor python_function, signature
    input_example.json           one row; serving_input_example.json: for `mlflow models predict`
    requirements.txt, python_env.yaml
    run/run.yaml                 settings of the run, with the address of the base
    run/base.json                SHA-256 digests of the base that the prompt was trained for
    run/prompts/NAME/            PEFT adapter

``trainer.commands.mlflow_model`` loads ``run/``. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import shutil
import string
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer import config
from trainer.config.task import template_fields
from trainer.config.tracking import Tracking
from trainer.evaluation.prediction_files import path_of
from trainer.runtime.json_file import parse_json
from trainer.tracking.run_metadata import ADAPTER_FILES, RunMetadata

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

LOADER = "trainer.commands.mlflow_model"
#: Begin of the names of the parts of a base in a checkpoint.
PART = "base.model, "
#: Columns of an example that is read back from a text: matching takes the power of their number.
MAX_COLUMNS = 3


def write_model(folder: RunMetadata, prompt: str, model: LoggedModel, target: Path) -> None:
    """Write the files of one prompt's model.

    Args:
        target: an existing, empty folder.

    Raises:
        BadInput: ``run.yaml`` does not load.
    """
    run = config.load_output(folder.path)
    task = run.task(next(p.task for p in run.prompts if p.name == prompt))
    source = target / "run"
    (source / "prompts" / prompt).mkdir(parents=True)
    base = run.base.model_copy(update={"model": _absolute(run.base.model)})
    kept = run.model_copy(update={"base": base, "tracking": Tracking()})
    (source / "run.yaml").write_text(config.dump(kept), encoding="utf-8")
    digests = base_digests(folder)
    reference = {"model": base.model, "revision": base.revision, "digests": digests}
    (source / "base.json").write_text(json.dumps(reference, indent=2), encoding="utf-8")
    for name in (*(f"prompts/{prompt}/{file}" for file in ADAPTER_FILES), "chat-date.txt"):
        if path := folder.file(name):
            shutil.copyfile(path, source / name)
    requirements = [f"{name}=={_version(name)}" for name in ("promptshard", "mlflow")]
    (target / "requirements.txt").write_text("\n".join(requirements) + "\n")
    _write_yaml(
        target / "python_env.yaml",
        {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]},
    )
    content = {
        "artifact_path": model.artifact_location,
        "flavors": {
            "python_function": {
                "loader_module": LOADER,
                "data": "run",
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": platform.python_version(),
            }
        },
        "metadata": {"prompt": prompt, "task": task.name, "base": reference},
        "mlflow_version": _version("mlflow"),
        "model_id": model.model_id,
        "model_uuid": model.model_id,
        "run_id": model.source_run_id,
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    if example := example_row(folder, prompt, task):
        content |= _write_example(example, task.choices is not None, target)
    _write_yaml(target / "MLmodel", content)


def base_digests(folder: RunMetadata) -> dict[str, str]:
    """Return the digests of the base's parts from the newest checkpoint; empty if there is none."""
    names = sorted(path.name for path in (folder.path / "checkpoints").glob("step-*"))
    state = folder.json(f"checkpoints/{names[-1]}/state.json") if names else None
    identity = state.get("identity") if isinstance(state, dict) else None
    parts = identity.items() if isinstance(identity, dict) else ()
    return {key: str(value) for key, value in parts if key.startswith(PART)}


def example_row(folder: RunMetadata, prompt: str, task: config.Task) -> dict[str, Any]:
    """Return the columns of the first validation row, read back from its text with the template.

    Empty for rows of token ids. The data files are not read: a run folder that comes from
    elsewhere could name any file.
    """
    if task.messages is not None:
        return {task.messages: [{"role": "user", "content": "..."}]}
    fields = [(literal, name) for literal, name, *_ in string.Formatter().parse(task.input or "")]
    columns = template_fields(task.input or "")
    pattern, seen = "", set[str]()
    for literal, name in fields:
        pattern += re.escape(literal)
        if name in columns:
            group = f"c{columns.index(name)}"
            pattern += f"(?P={group})" if name in seen else f"(?P<{group}>.*?)"
            seen.add(name)
    path = folder.file(path_of(Path(), prompt).as_posix())
    record: Any = None
    if path is not None:
        with contextlib.suppress(ValueError), path.open(encoding="utf-8") as file:
            record = parse_json(file.readline(1 << 20))
    text = record.get("input") if isinstance(record, Mapping) else None
    is_read = isinstance(text, str) and len(columns) <= MAX_COLUMNS
    match = re.fullmatch(pattern, str(text), re.DOTALL) if is_read else None
    return {name: match[f"c{i}"] if match else "..." for i, name in enumerate(columns)}


def _write_example(example: Mapping[str, Any], has_choices: bool, target: Path) -> dict[str, Any]:
    """Write the files of an input example; return the fields of ``MLmodel`` for its columns."""
    inputs = [
        {"type": "string" if isinstance(value, str) else "any", "name": name, "required": True}
        for name, value in example.items()
    ]
    outputs: list[dict[str, Any]] = [
        {"type": "any", "name": "prediction", "required": True},
        {"type": "double", "name": "log_probability", "required": True},
    ]
    if has_choices:
        outputs.append({"type": "any", "name": "probabilities", "required": True})
    split = {"columns": list(example), "data": [list(example.values())]}
    _write_json(target / "input_example.json", split)
    _write_json(target / "serving_input_example.json", {"dataframe_split": split})
    return {
        "saved_input_example_info": {
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "dataframe",
            "pandas_orient": "split",
        },
        "signature": {
            "inputs": json.dumps(inputs),
            "outputs": json.dumps(outputs),
            "params": None,
        },
    }


def _absolute(model: str) -> str:
    """Return the absolute path of a base that is a file or folder here; a hub id is unchanged."""
    path = Path(model)
    return str(path.absolute()) if path.exists() else model


def _version(name: str) -> str:
    for distribution in (name, f"{name}-skinny"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _write_yaml(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
