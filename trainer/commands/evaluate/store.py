"""Prediction files of an evaluation: one record per row, appended as rows are scored.

    TASK/ARM.jsonl         a record per row, in the order of the rows
    TASK/ARM.json          how the answers were made, and the digest of all that they depend on
    TASK/.earlier/         the same two files for other rows, metrics, sampling settings or prompts
    TASK/.retrieved.json   train rows retrieved by hidden states

These files are in ``RUN_DIR/predictions/evaluation``.
An interrupted evaluation continues after the last complete record. If the digest differs, such as
after the prompt was trained again, the arm is scored from the beginning; its earlier records are
used again as soon as an evaluation has their digest. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.evaluation.prediction_files import FOLDER, read
from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.file_lock import exclusive
from trainer.runtime.json_file import read_json_object, to_json

#: Folder of the evaluation in ``predictions``, beside the files of training.
EVALUATION = "evaluation"
#: File of a task with the rows that the base retrieved. No arm has this name.
RETRIEVED = ".retrieved.json"
#: Hidden folder of a task with the records that the last evaluation did not use.
EARLIER = ".earlier"


class PredictionStore:
    """Reads and appends records; used on rank 0 only."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER / EVALUATION

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder; raises ``BadInput`` if another evaluation has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        problem = f"{self.folder}: another evaluation of this run is running; wait until it ends"
        with exclusive(self.folder / ".lock", problem):
            yield

    def path(self, task: str, arm: str) -> Path:
        return self.folder / task / f"{arm}.jsonl"

    def open(
        self,
        task: str,
        arm: str,
        digest: str,
        *,
        fresh: bool,
        about: Mapping[str, Any] | None = None,
    ) -> int:
        """Prepare the file of an arm; return the number of its complete records.

        Args:
            digest: of everything that the records depend on.
            fresh: remove earlier records with this digest.
            about: describes how the answers are made.
        """
        path = self.path(task, arm)
        path.parent.mkdir(parents=True, exist_ok=True)
        current, earlier = _digest(path), self._earlier(path, digest)
        if current not in (None, digest):
            _move(path, self._earlier(path, str(current)))
        if not fresh:
            if current != digest and _digest(earlier) == digest:
                _move(earlier, path)
            if _digest(path) == digest:
                return _complete(path)
        for file in (path, earlier, earlier.with_suffix(".json")):
            file.unlink(missing_ok=True)
        atomic_io.write_json(path.with_suffix(".json"), {"digest": digest} | dict(about or {}))
        return 0

    def _earlier(self, path: Path, digest: str) -> Path:
        return path.parent / EARLIER / f"{path.stem}-{digest[:16]}.jsonl"

    def note(self, task: str, arm: str, setup_seconds: float) -> None:
        """Record the time to prepare an arm."""
        path = self.path(task, arm).with_suffix(".json")
        atomic_io.write_json(path, read_json_object(path) | {"setup_seconds": setup_seconds})

    def setup_seconds(self, task: str, arm: str) -> float | None:
        """Return the time from ``note``; None without one."""
        seconds = read_json_object(self.path(task, arm).with_suffix(".json")).get("setup_seconds")
        return seconds if isinstance(seconds, float) else None

    def keep_retrieved(self, task: str, digest: str, values: Mapping[str, Any]) -> None:
        """Write which train rows were retrieved for the rows of a task."""
        path = self.folder / task / RETRIEVED
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write_json(path, {"digest": digest, "values": dict(values)})

    def read_retrieved(self, task: str, digest: str) -> dict[str, Any] | None:
        """Return what ``keep_retrieved`` wrote; None if there is nothing with this digest."""
        with suppress(BadInput):
            kept = read_json_object(self.folder / task / RETRIEVED)
            values = kept.get("values")
            if kept.get("digest") == digest and isinstance(values, dict):
                return values
        return None

    def append(self, task: str, arm: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records and write them to disk."""
        lines = [to_json(record, ensure_ascii=False) + "\n" for record in records]
        with self.path(task, arm).open("ab") as file:
            file.write("".join(lines).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())

    def records(self, task: str, arm: str) -> list[dict[str, Any]]:
        """Return all records of an arm; raises ``BadInput`` if the file is damaged."""
        path = self.path(task, arm)
        try:
            return list(read(path))
        except ValueError as error:
            raise BadInput(
                f"{path}: is damaged ({error}); remove it and repeat the command"
            ) from None


def _digest(path: Path) -> str | None:
    """Digest of the records in a file; None if it is unknown."""
    with suppress(BadInput):
        digest = read_json_object(path.with_suffix(".json")).get("digest")
        return digest if isinstance(digest, str) else None
    return None


def _move(source: Path, target: Path) -> None:
    """Move a file of records, if a row was scored, and its description."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.exists():
        source.replace(target)
    else:
        target.unlink(missing_ok=True)
    source.with_suffix(".json").replace(target.with_suffix(".json"))


def _complete(path: Path) -> int:
    """Remove an incomplete last line; return the number of lines."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return content.count(b"\n")
