"""``tracking.json``: an output folder's runs in each MLflow store, and what was sent so far."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from trainer.runtime import atomic_io
from trainer.tracking.metrics_log import SYSTEM_FILE

FILE = "tracking.json"


def forget_tracking(output_dir: Path) -> None:
    """Detach an output folder from its runs in all stores."""
    for name in (FILE, SYSTEM_FILE):
        (output_dir / name).unlink(missing_ok=True)


@dataclass
class StoreProgress:
    """Data that one store has received. Only a hint: the store itself is queried first."""

    experiment_id: str | None = None
    run_id: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)  #: prompt -> run id
    offsets: dict[str, int] = field(default_factory=dict)  #: file -> bytes sent
    artifacts: dict[str, str] = field(default_factory=dict)  #: Artifact.key -> digest
    models: dict[str, str] = field(default_factory=dict)  #: prompt -> digest of its adapter
    #: prompt -> name of the registered model and digest of the adapter
    registered: dict[str, str] = field(default_factory=dict)
    lacks: str | None = None  #: data for which the server is too old; a message for the user
    status: str | None = None  #: RUNNING, FINISHED, FAILED, KILLED
    page: str | None = None  #: page of MLflow's web interface that shows the curves


@dataclass
class _Content:
    #: Identifies the output folder's runs in every store.
    output_id: Annotated[str, Field(pattern="^[0-9a-f]+$")]
    store: str | None = None  #: name of the store used last; an SQLite store has an absolute path
    problem: str | None = None  #: why the sender cannot send at present; a message for the user
    stores: dict[str, StoreProgress] = field(default_factory=dict)  #: by name of the store


class ProgressFile(_Content):
    """``tracking.json`` of an output folder; empty if the file is missing or damaged."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FILE
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            content = TypeAdapter(_Content).validate_python(data)
        except (OSError, ValueError, RecursionError):
            content = _Content(uuid.uuid4().hex)
        super().__init__(**vars(content))

    def save(self) -> None:
        atomic_io.write_json(self.path, asdict(self))


def missing_results(output_dir: Path) -> str | None:
    """Name the results that a finished run did not write or send; None if it is complete."""
    missing = [] if (output_dir / "report.html").exists() else ["report.html"]
    state = ProgressFile(output_dir)
    progress = state.stores.get(state.store or "")
    if state.store and (progress is None or progress.status != "FINISHED"):
        missing.append("the end of the run in MLflow")
    return " and ".join(missing) or None
