"""Run loaded arms in turns, which are files in a folder: one computes while the others sleep."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Turns:
    """Used by a rank: waits for its arm's turn, then reports its measurements."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def wait(self, turn: int) -> None:
        """Wait until the conductor starts this turn."""
        _touch(self._folder / f"ready.{turn}.{self._rank}")
        while not (self._folder / f"go.{turn}").exists():
            time.sleep(0.02)

    def done(self, turn: int, result: dict[str, Any], *, free_memory: bool = True) -> None:
        path = self._folder / f"done.{turn}.{self._rank}"
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(result))
        part.rename(path)
        if free_memory:
            ctypes.CDLL(None).malloc_trim(0)  # the other arms need it now


class Conductor:
    """Used by the main process: starts turns of the ranks of one arm."""

    def __init__(self, folder: Path, ranks: int, alive: Callable[[], None]) -> None:
        self._folder, self._ranks, self._alive = folder, ranks, alive
        folder.mkdir(parents=True)

    def ready(self, turn: int) -> None:
        """Wait until every rank waits for this turn."""
        self._until([self._folder / f"ready.{turn}.{rank}" for rank in range(self._ranks)])

    def play(self, turn: int) -> list[dict[str, Any]]:
        """Start a turn, and wait for the measurements of every rank."""
        self.ready(turn)
        _touch(self._folder / f"go.{turn}")
        results = [self._folder / f"done.{turn}.{rank}" for rank in range(self._ranks)]
        self._until(results)
        return [json.loads(result.read_text()) for result in results]

    def _until(self, paths: list[Path]) -> None:
        while not all(path.exists() for path in paths):
            self._alive()
            time.sleep(0.05)


def _touch(path: Path) -> None:
    path.write_text("")
