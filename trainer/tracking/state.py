"""``tracking.json``: which runs an output folder has in which store, and what was sent so far."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer import atomic
from trainer.tracking.metrics_log import SYSTEM_FILE

FILE = "tracking.json"


def forget_tracking(output_dir: Path) -> None:
    """From now on an output folder is none that any store knows."""
    for name in (FILE, SYSTEM_FILE):
        (output_dir / name).unlink(missing_ok=True)


@dataclass
class Progress:
    """What one store has. Only a hint on where to go on: the store itself is asked first."""

    experiment_id: str | None = None
    run_id: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)  #: prompt -> run id
    offsets: dict[str, int] = field(default_factory=dict)  #: file -> bytes sent
    tails: dict[str, str] = field(default_factory=dict)  #: file -> digest of the bytes before
    artifacts: dict[str, str] = field(default_factory=dict)  #: Artifact.key -> digest
    status: str | None = None  #: RUNNING, FINISHED, FAILED, KILLED
    page: str | None = None  #: of MLflow's web pages, where the curves are


class State:
    """``tracking.json``: the folder's identity and, per store, its progress."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FILE
        self.output_id = uuid.uuid4().hex
        self.stale_summary_ns: int | None = None
        self.stores: dict[str, Progress] = {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            self.output_id = data["output_id"]
            self.stale_summary_ns = data.get("stale_summary_ns")
            known = Progress.__dataclass_fields__
            self.stores = {
                name: Progress(**{k: v for k, v in item.items() if k in known})
                for name, item in data["stores"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or garbled: the store is asked by the folder's name then

    def save(self) -> None:
        data = {
            "output_id": self.output_id,
            "stale_summary_ns": self.stale_summary_ns,
            "stores": {name: asdict(item) for name, item in self.stores.items()},
        }
        atomic.write_json(self.path, data)
