"""``tracking.json``: which runs an output folder has in which store, and what was sent so far."""

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
    """Detach an output folder from the runs that stores have of it."""
    for name in (FILE, SYSTEM_FILE):
        (output_dir / name).unlink(missing_ok=True)


@dataclass
class StoreProgress:
    """What one store has. Only a hint where to continue: the store itself is asked first."""

    experiment_id: str | None = None
    run_id: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)  #: prompt -> run id
    offsets: dict[str, int] = field(default_factory=dict)  #: file -> bytes sent
    tails: dict[str, str] = field(default_factory=dict)  #: file -> digest of the bytes before
    artifacts: dict[str, str] = field(default_factory=dict)  #: Artifact.key -> digest
    status: str | None = None  #: RUNNING, FINISHED, FAILED, KILLED
    page: str | None = None  #: of MLflow's web pages, where the curves are


@dataclass
class _Content:
    output_id: Annotated[str, Field(pattern="^[0-9a-f]+$")]
    stale_summary_ns: int | None = None
    store: str | None = None
    problem: str | None = None
    stores: dict[str, StoreProgress] = field(default_factory=dict)


class ProgressFile:
    """``tracking.json``: the folder's identity and, per store, its progress.

    Attributes:
        store: the name of the store that was used last; of SQLite, with its absolute path.
        problem: why the sender cannot send now, for a person.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FILE
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            found = TypeAdapter(_Content).validate_python(data)
        except (OSError, ValueError, RecursionError):  # none yet, or damaged
            found = _Content(uuid.uuid4().hex)
        self.output_id, self.stale_summary_ns = found.output_id, found.stale_summary_ns
        self.store, self.problem, self.stores = found.store, found.problem, found.stores

    def save(self) -> None:
        content = _Content(
            self.output_id, self.stale_summary_ns, self.store, self.problem, self.stores
        )
        atomic_io.write_json(self.path, asdict(content))


def missing_results(output_dir: Path) -> str | None:
    """Name what a finished run was killed before writing or sending; None if that is complete."""
    missing = [] if (output_dir / "report.html").exists() else ["report.html"]
    state = ProgressFile(output_dir)
    progress = state.stores.get(state.store or "")
    if state.store and (progress is None or progress.status != "FINISHED"):
        missing.append("the end of the run in MLflow")
    return " and ".join(missing) or None
