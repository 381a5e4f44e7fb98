"""Reads the files that a run has written into its output folder, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import yaml_source
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json
from trainer.tracking.metrics_log import Line, read_lines


@dataclass
class FolderFiles:
    """Reads the files that a run has written into its output folder; a missing file is empty.

    The folder may come from elsewhere: nothing is read through a symlink, so that no other file of
    this machine gets to a tracker.
    """

    path: Path
    _run_file: tuple[Any, dict[str, Any]] = field(default=(None, {}), init=False, repr=False)

    def file(self, name: str) -> Path | None:
        """The regular file ``name`` ("a/b") of the folder, if it and its folders are no symlinks.

        ``name`` itself may come from a file of the folder.
        """
        path = self.path
        for part in name.split("/"):
            path = path / part
            if part in ("", ".", "..") or path.is_symlink():
                return None
        return path if path.is_file() else None

    def lines(self, name: str, offset: int = 0) -> Iterator[tuple[Line | None, int]]:
        """``read_lines`` of a file of the folder."""
        path = self.file(name)
        return iter(()) if path is None else read_lines(path, offset)

    @property
    def run_file(self) -> dict[str, Any]:
        """Parsed once: each of many prompts asks for it, and it holds them all."""
        try:
            path = self.file("run.yaml")
            if path is None:
                return {}
            stat = path.stat()
            version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if version != self._run_file[0]:
                self._run_file = version, yaml_source.saved(path)
        except OSError:
            return {}
        return self._run_file[1]

    def json(self, name: str) -> Any:
        try:
            path = self.file(name)
            return None if path is None else read_json(path)
        except BadInput:
            return None


def mapping(value: Any) -> dict[str, Any]:
    """``value`` if it is a mapping, else an empty one: files of a folder may hold anything."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list; others are left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def named(value: Any) -> list[dict[str, Any]]:
    return [item for item in mappings(value) if isinstance(item.get("name"), str)]
