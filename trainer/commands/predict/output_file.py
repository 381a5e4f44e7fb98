"""Output of ``promptshard predict``: JSON Lines, written in the order of the rows.

    OUT              one line per row
    OUT.about.json   what the lines depend on, so that an interrupted command continues

Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.file_lock import exclusive
from trainer.runtime.json_file import parse_json, read_json_object, to_json

_BLOCK_BYTES = 1 << 20


class OutputFile:
    """Reads and appends lines; used on rank 0 only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = path.with_name(f"{path.name}.about.json")

    def check(self, identity: Mapping[str, Any], *, fresh: bool) -> None:
        """Raise ``BadInput`` if the file cannot be written, or has lines of other inputs."""
        if self.path.is_dir():
            raise BadInput(f"--out: {self.path} is a folder; name a file")
        if not os.access(self.path.absolute().parent, os.W_OK | os.X_OK):
            raise BadInput(
                f"--out: cannot write into {self.path.absolute().parent}; name an existing folder"
            )
        if self._is_new(fresh):
            return
        try:
            before = read_json_object(self.about)
        except BadInput:
            raise BadInput(
                f"--out: {self.path} exists, and without {self.about.name} it is not known what "
                "wrote it; name another file, or use --fresh to replace it"
            ) from None
        wanted = json.loads(json.dumps(identity))
        different = [key for key in wanted if before.get(key) != wanted[key]]
        if different:
            raise BadInput(
                f"--out: {self.path} has predictions of other {', '.join(different)}; name another "
                "file, or use --fresh to replace it"
            )

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the file; raises ``BadInput`` if another command writes it."""
        problem = f"--out: another command writes {self.path}; wait until it ends"
        return exclusive(self.about, problem)

    def open(self, identity: Mapping[str, Any], *, fresh: bool) -> int:
        """Prepare the file and return the number of its complete lines.

        An incomplete last line is removed.

        Raises:
            BadInput: as ``check``, or the last line is not a line of this command.
        """
        self.check(identity, fresh=fresh)
        if self._is_new(fresh):
            # In place: the lock is on this file.
            self.about.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
            atomic_io.write(self.path, "")
            return 0
        lines, last = _complete(self.path)
        if lines and _row_of(last) != lines:
            raise BadInput(
                f"--out: {self.path}:{lines}: is not the prediction for row {lines}; restore the "
                "file, or use --fresh to replace it"
            )
        return lines

    def num_lines(self) -> int:
        """Number of complete lines; 0 without the file."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))

    def _is_new(self, fresh: bool) -> bool:
        return fresh or not self.path.exists() or self.path.stat().st_size == 0

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append lines and write them to disk."""
        lines = "".join(to_json(record, ensure_ascii=False) + "\n" for record in records)
        with self.path.open("ab") as file:
            file.write(lines.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())


def _complete(path: Path) -> tuple[int, bytes]:
    """Remove an incomplete last line; return the number of lines, and the last one."""
    lines = end = start = 0
    with path.open("r+b") as file:
        position = 0
        while block := file.read(_BLOCK_BYTES):
            lines += block.count(b"\n")
            if (last := block.rfind(b"\n")) >= 0:
                before = block.rfind(b"\n", 0, last)
                start = position + before + 1 if before >= 0 else end
                end = position + last + 1
            position += len(block)
        if end < position:
            file.truncate(end)
        file.seek(start)
        return lines, file.read(end - start)


def _row_of(line: bytes) -> int | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record.get("row") if isinstance(record, dict) else None
