"""Convert a run's output folder to MLflow params, tags, datasets and artifacts."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.evaluation.prediction_files import BASELINES, files_in, path_of
from trainer.runtime.json_file import parse_json
from trainer.runtime.redact import redact
from trainer.tracking.run_files import RunFiles, mapping, mappings, named
from trainer.tracking.tables import ReadTable, evaluation_rows, prediction_rows

#: MLflow's limits (mlflow.utils.validation), which refuses a whole batch for one longer value. Its
#: pages show digests in full, so they are cut as in git; the dataset's profile has the full digest.
MAX_KEY, MAX_PARAM, MAX_TAG, MAX_DIGEST = 250, 6000, 5000, 12
#: Settings that are not params of the parent run; tasks are added by name, prompts have own runs.
NOT_PARAMS = ("output_dir", "tracking", "prompts", "tasks")
#: Folder of the report's plots as PNG.
PLOTS = "plots"
ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class PromptResult:
    """Final results of one prompt."""

    step: int  #: training step of the saved adapter
    metrics: Mapping[str, float]  #: scores of the adapter and of its baselines
    tags: Mapping[str, str]  #: how training ended and whether the prompt was selected


@dataclass(frozen=True)
class FinalResults:
    """Final results of a run; ``trainer.reporting.mlflow_note`` computes them."""

    note: str  #: description of the parent run (Markdown)
    prompts: Mapping[str, PromptResult]


#: Reads the final results from an output folder. Commands pass it in, because tracking does not
#: import reporting.
ReadResults = Callable[[Path], FinalResults]


@dataclass(frozen=True)
class Artifact:
    """A file to upload."""

    prompt: str | None  #: the prompt whose run receives the file; None: the parent run
    path: Path
    folder: str  #: artifact folder in MLflow, of a file that is sent unchanged
    text: str | None = None  #: path in MLflow of a text, which is sent with credentials hidden
    table: ReadTable | None = None  #: converts the file to a table, which is sent as the text

    @property
    def key(self) -> str:
        return f"{self.prompt or ''}:{self.folder}/{self.path.name}"

    def digest(self) -> str:
        return file_digest(self.path)


class RunMetadata(RunFiles):
    """Reads params, tags, datasets and artifacts from a run's output folder."""

    @property
    def name(self) -> str:
        return os.environ.get("MLFLOW_RUN_NAME") or self.path.resolve().name

    def params(self) -> dict[str, str]:
        """Return the settings of the run, flat: ``base.model``, ``tasks.triage.metric``, ..."""
        settings = self.settings
        tree: dict[str, Any] = {k: v for k, v in settings.items() if k not in NOT_PARAMS}
        tree["tasks"] = {task["name"]: task for task in named(settings.get("tasks"))}
        environment = mapping(self.json("environment.json"))
        for key in ("world_size", "device", "versions"):
            if key in environment:
                tree[key] = environment[key]
        return dict(_flatten(tree))

    def prompt_params(self, prompt: Mapping[str, Any]) -> dict[str, str]:
        """Return the settings of one prompt, and the run's settings that are useful to compare."""
        training, base = (mapping(self.settings.get(key)) for key in ("training", "base"))
        tree: dict[str, Any] = {k: v for k, v in prompt.items() if k != "name"}
        tree["init"] = _init_text(prompt.get("init"))
        for key in ("steps", "tokens_per_step"):
            tree[f"training.{key}"] = training.get(key)
        for key in ("model", "quantization"):
            tree[f"base.{key}"] = base.get(key)
        return dict(_flatten(tree))

    def tags(self) -> dict[str, str]:
        """Return the tags of the parent run."""
        settings, environment = self.settings, mapping(self.json("environment.json"))
        job = os.environ.get("SLURM_JOB_ID")
        tags = {
            "kind": "run",
            "base_model": Path(str(mapping(settings.get("base")).get("model") or "")).name,
            "output_dir": str(self.path.resolve()),
            "tasks": ", ".join(task["name"] for task in named(settings.get("tasks"))),
            "command": environment.get("command"),
            "mlflow.user": _user(),
            "mlflow.source.name": "promptshard",
            "mlflow.source.type": "JOB" if job else "LOCAL",
            "mlflow.source.git.commit": environment.get("git_revision"),
            "slurm_job_id": job,
        }
        return clean_tags(tags | _environment_tags())

    def prompt_tags(self, prompt: Mapping[str, Any]) -> dict[str, str]:
        """Return the tags of a prompt's run."""
        own = {"kind": "prompt", "prompt": prompt["name"]}
        own |= {key: prompt.get(key) for key in ("task", "method")}
        common = {k: v for k, v in self.tags().items() if k not in ("kind", "tasks", "command")}
        return common | clean_tags(own)

    def datasets(self, task: str | None = None) -> list[dict[str, Any]]:
        """Return the entries of ``datasets.json``, all or those of a task."""
        entries = mappings(self.json("datasets.json"))
        return [entry for entry in entries if task is None or entry.get("task") == task]

    def early_artifacts(self) -> list[Artifact]:
        """Return the files that exist when training starts."""
        return self._texts("run.yaml", "environment.json", "datasets.json")

    def late_artifacts(self) -> list[Artifact]:
        """Return files of results and tables: predictions of baselines go to the parent run."""
        artifacts = self._texts("summary.json", "report.html", "evaluation.json", "inspection.json")
        names = [prompt["name"] for prompt in self.prompts]
        for name in names:
            for folder in ("", "/last"):
                for file in ADAPTER_FILES:
                    if path := self.file(f"prompts/{name}{folder}/{file}"):
                        artifacts.append(Artifact(name, path, f"adapter{folder}"))
        predictions = files_in(self.path)
        baselines = Counter(p.name for p in predictions if p.parent.parent.name == BASELINES)
        for path in predictions:
            relative = path.relative_to(self.path)
            prompt = path.stem if len(relative.parts) == 2 else None
            if self.file(relative.as_posix()) and (prompt is None or prompt in names):
                # Baselines of two tasks can have the same name, and so can arms of an evaluation.
                is_baseline = path.parent.parent.name == BASELINES
                is_unique = prompt is not None or (is_baseline and baselines[path.name] == 1)
                text = path.name if is_unique else relative.as_posix()
                artifacts.append(Artifact(prompt, path, relative.parent.as_posix(), text))
        artifacts += self._tables(names)
        for path in sorted((self.path / PLOTS).glob("*.png")):
            if self.file(f"{PLOTS}/{path.name}"):
                artifacts.append(Artifact(None, path, PLOTS))
        return artifacts

    def _tables(self, prompts: Sequence[str]) -> list[Artifact]:
        """Return the tables of the evaluation and of some predictions of each prompt."""
        tables = []
        if path := self.file("evaluation.json"):
            name = "evaluation_table.json"
            tables.append(Artifact(None, path, "table", name, evaluation_rows))
        for prompt in prompts:
            if path := self.file(path_of(Path(), prompt).as_posix()):
                name = "predictions_table.json"
                tables.append(Artifact(prompt, path, "table", name, prediction_rows))
        return tables

    def adapters(self) -> dict[str, Path]:
        """Return the file of the best adapter of each prompt that has one."""
        weights = ADAPTER_FILES[-1]
        files = {p["name"]: self.file(f"prompts/{p['name']}/{weights}") for p in self.prompts}
        return {name: path for name, path in files.items() if path is not None}

    def _texts(self, *names: str) -> list[Artifact]:
        return [Artifact(None, p, "", n) for n in names if (p := self.file(n))]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dataset_fields(entry: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return the fields of an MLflow dataset, and its context, for an entry of datasets.json."""
    split, digest = str(entry.get("split", "")), str(entry.get("digest", ""))
    # MLflow's tables sort datasets by name: the shifted split comes after the validation split.
    shown = "validation (shifted)" if split == "shifted_validation" else split.replace("_", " ")
    fields = {
        "name": f"{entry.get('task')} {shown}",
        "digest": digest[:MAX_DIGEST],
        "source_type": "local",
        "source": json.dumps({"uri": redact(str(entry.get("path", "")))}),
        "profile": json.dumps({"num_rows": entry.get("rows"), "sha256": entry.get("digest")}),
    }
    return fields, "training" if split == "train" else split


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, name + ".")
        elif key != "name" and value is not None:  # the name is part of the path already
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield legal(name), shorten(redact(text), MAX_PARAM)


def shorten(text: str, limit: int, place: str = "run.yaml") -> str:
    """Cut text to ``limit`` characters, with a note of its full length and of its place."""
    if len(text) <= limit:
        return text
    note = f" … [{len(text)} characters, full text in {place}]"
    return text[: limit - len(note)] + note


def legal(name: str) -> str:
    """Replace characters that MLflow refuses in names, and cut to its limit."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)[:MAX_KEY]


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Drop empty tags; hide credentials in the others and cut them to MLflow's limits."""
    return {legal(k): shorten(redact(str(v)), MAX_TAG) for k, v in tags.items() if v}


def _environment_tags() -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in mapping(parse_json(os.environ["MLFLOW_TAGS"])).items()}
    except (KeyError, ValueError):
        return {}


def _init_text(init: Any) -> str:
    """Return ``{auto: false, text: ..., vocab: false}`` in short: ``text: ...``, ``vocab``."""
    options = mapping(init).items()
    return next((f"{k}: {v}" if isinstance(v, str) else k for k, v in options if v), str(init))


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return None
