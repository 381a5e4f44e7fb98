"""A run's output folder as MLflow's params, tags, metrics and artifacts."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.evaluation import prediction_files
from trainer.runtime.redact import redact
from trainer.tracking.metrics_log import METRICS_FILE
from trainer.tracking.run_files import FolderFiles, mapping, mappings, named

#: MLflow's limits (mlflow.utils.validation); a longer value would be refused with the whole batch.
#: Of a digest, its pages show all: as many letters as git does; the whole is in the profile.
MAX_KEY, MAX_PARAM, MAX_TAG, MAX_DIGEST = 250, 6000, 5000, 12
#: Settings that say where a run was written and not what it did.
NOT_PARAMS = ("output_dir", "tracking", "prompts", "tasks")
#: What ``export.save_peft`` writes.
ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


class RunMetadata(FolderFiles):
    """A run's output folder as params, tags, metrics and artifacts."""

    @property
    def environment(self) -> dict[str, Any]:
        return mapping(self.json("environment.json"))

    def summary(self, stale_ns: int | None = None) -> dict[str, Any]:
        """``summary.json``, unless it is the one that an earlier session left behind."""
        try:
            if (self.path / "summary.json").stat().st_mtime_ns == stale_ns:
                return {}
        except OSError:
            return {}
        return mapping(self.json("summary.json"))

    @property
    def tracking(self) -> dict[str, Any]:
        return mapping(self.run_file.get("tracking"))

    @property
    def name(self) -> str:
        return os.environ.get("MLFLOW_RUN_NAME") or self.path.resolve().name

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return named(self.run_file.get("prompts"))

    @property
    def tasks(self) -> list[dict[str, Any]]:
        return named(self.run_file.get("tasks"))

    def params(self) -> dict[str, str]:
        """Settings of the whole run, flat: ``base.model``, ``tasks.triage.metric``, ..."""
        run = self.run_file
        tree: dict[str, Any] = {k: v for k, v in run.items() if k not in NOT_PARAMS}
        tree["tasks"] = {task["name"]: task for task in self.tasks}
        environment = self.environment
        for key in ("world_size", "device", "versions"):
            if key in environment:
                tree[key] = environment[key]
        return dict(_flatten(tree))

    def prompt_params(self, prompt: Mapping[str, Any]) -> dict[str, str]:
        """Settings of one prompt, and those of the run that a comparison over runs needs."""
        run = self.run_file
        training, base = mapping(run.get("training")), mapping(run.get("base"))
        settings: dict[str, Any] = {k: v for k, v in prompt.items() if k not in ("name", "init")}
        if settings.get("seed") is None:
            settings["seed"] = training.get("seed", 0)
        if settings.get("data_seed") is None:
            settings["data_seed"] = settings["seed"]
        settings["steps"] = prompt.get("steps") or training.get("steps")
        settings["encoder"] = prompt.get("encoder") or (
            "mlp" if prompt.get("method") == "p_tuning" else "embedding"
        )
        settings["init"] = _init(prompt.get("init"))
        for key in ("steps", "tokens_per_step"):
            settings[f"training.{key}"] = training.get(key)
        for key in ("model", "quantization"):
            settings[f"base.{key}"] = base.get(key)
        return dict(_flatten(settings))

    def tags(self) -> dict[str, str]:
        environment = self.environment
        run = self.run_file
        tags = {
            "kind": "run",
            "base_model": Path(str(mapping(run.get("base")).get("model") or "")).name,
            "output_dir": str(self.path.resolve()),
            "tasks": ", ".join(task["name"] for task in self.tasks),
            "command": environment.get("command"),
            "mlflow.user": _user(),
            "mlflow.source.name": "promptshard",
            "mlflow.source.type": "JOB" if os.environ.get("SLURM_JOB_ID") else "LOCAL",
            "mlflow.source.git.commit": environment.get("git_revision"),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            **_environment_tags(),
        }
        return clean_tags(tags)

    @property
    def started(self) -> float | None:
        """When the run was first set up, unix seconds; a resumed run writes run.yaml again."""
        lines = (line for line, _ in self.lines(METRICS_FILE) if line is not None)
        first = next(lines, None)
        times = [first.time] if first is not None else []
        with contextlib.suppress(OSError):
            times.append((self.path / "run.yaml").stat().st_mtime)
        return min(times, default=None)

    def prompt_tags(self, prompt: Mapping[str, Any]) -> dict[str, str]:
        own = {
            "kind": "prompt",
            "prompt": prompt["name"],
            "task": prompt.get("task"),
            "method": prompt.get("method"),
        }
        common = {k: v for k, v in self.tags().items() if k not in ("kind", "tasks", "command")}
        return common | clean_tags(own)

    def datasets(self, task: str | None = None) -> list[dict[str, Any]]:
        found = mappings(self.json("datasets.json"))
        return [item for item in found if task is None or item.get("task") == task]

    def early_artifacts(self) -> list[Artifact]:
        return self._texts("run.yaml", "environment.json", "datasets.json")

    def late_artifacts(self) -> list[Artifact]:
        found = self._texts("summary.json", "report.html")
        names = [prompt["name"] for prompt in self.prompts]
        for name in names:
            for inside in ("", "/last"):
                for file in ADAPTER_FILES:
                    if path := self.file(f"prompts/{name}{inside}/{file}"):
                        found.append(Artifact(name, path, f"adapter{inside}"))
        return found + self._predictions()

    def _predictions(self) -> list[Artifact]:
        """Predictions of every prompt for its own run, those of baselines for the parent."""
        found = []
        names = {str(prompt["name"]) for prompt in self.prompts}
        for path in prediction_files.files_in(self.path):
            inside = path.relative_to(self.path)
            of_prompt = len(inside.parts) == 2
            if self.file(inside.as_posix()) and (not of_prompt or path.stem in names):
                prompt = path.stem if of_prompt else None
                found.append(Artifact(prompt, path, inside.parent.as_posix(), text=True))
        return found

    def _texts(self, *names: str) -> list[Artifact]:
        return [Artifact(None, p, "", text=True) for n in names if (p := self.file(n))]


@dataclass(frozen=True)
class Artifact:
    """A file for MLflow: the prompt whose run gets it (None: the parent), and the folder there."""

    prompt: str | None
    path: Path
    folder: str
    text: bool = False  #: sent with credentials hidden

    @property
    def key(self) -> str:
        return f"{self.prompt or ''}:{self.folder}/{self.path.name}"

    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, name + ".")
        elif key == "name":
            continue  # already in the path
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield legal(name), shorten(redact(text), MAX_PARAM)


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters; names the full length and the file that has the full text."""
    if len(text) <= limit:
        return text
    note = f" … [{len(text)} characters, whole text in run.yaml]"
    return text[: limit - len(note)] + note


def legal(name: str) -> str:
    """MLflow takes letters, digits and ``_-. :/`` in names, at most 250 of them."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)[:MAX_KEY]


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Drop empty tags; hide credentials in the others and cut them to MLflow's limits."""
    return {legal(k): shorten(redact(str(v)), MAX_TAG) for k, v in tags.items() if v}


def _environment_tags() -> dict[str, str]:
    try:
        tags = json.loads(os.environ.get("MLFLOW_TAGS") or "{}")
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in tags.items()} if isinstance(tags, dict) else {}


def _init(init: Any) -> str:
    """``{text: ..., vocab: false, random: false}`` as a person would say it."""
    if not isinstance(init, Mapping):
        return str(init or "vocab")
    for key in ("text", "from_", "from"):
        if init.get(key):
            return f"{key.rstrip('_')}: {init[key]}"
    return next((k for k, v in init.items() if v), "vocab")


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return None
