"""Results of cells: one JSON file each in the work folder, and all of them beside the table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.runtime import atomic_io


@dataclass(frozen=True)
class Cell:
    """One training, or one baseline.

    Attributes:
        rows: number of training rows.
        words: reviews are cut after this number of words; 0: they are whole.
        rate: learning rate of a PEFT arm; None for baselines and this trainer's defaults.
    """

    arm: str
    task: str
    rows: int
    steps: int
    tokens_per_step: int
    validation_rows: int
    words: int
    seed: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{self.arm} on {self.task} ({self.rows} rows, seed {self.seed}{rate})"


class Cells:
    """Results of cells by key. A key is a digest of the cell and its resolved settings.

    A result whose settings are no longer those of the code is never found, and so is measured
    again.

    Args:
        folder: one file per result.
        committed: file with the results of earlier calls, maybe on other machines.
    """

    def __init__(self, folder: Path, committed: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._results: dict[str, dict[str, Any]] = {}
        if committed.exists():
            for record in json.loads(committed.read_text())["cells"]:
                self._results[record["key"]] = record
        for path in folder.glob("*.json"):
            record = json.loads(path.read_text())
            self._results[record["key"]] = record

    def get(self, cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of a cell, or None."""
        record = self._results.get(key_of(cell, settings))
        return None if record is None else record["result"]

    def put(self, cell: Cell, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep the result of a cell; replaces an earlier one."""
        key = key_of(cell, settings)
        record = {"key": key, "cell": asdict(cell), "settings": settings, "result": result}
        self._results[key] = json.loads(json.dumps(record))
        atomic_io.write(self._folder / f"{key}.json", json.dumps(record, indent=1) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records, in an order that does not depend on when they were measured."""
        records = self._results.values()
        return iter(sorted(records, key=lambda record: (str(record["cell"]), record["key"])))


def key_of(cell: Cell, settings: Mapping[str, Any]) -> str:
    text = json.dumps([asdict(cell), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
