"""A run's output folder that is moved, deleted or full while the run writes to it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.checkpointing.checkpoint_names import checkpoint_names
from trainer.checkpointing.run_lock import Lock
from trainer.tracking import MetricsLog

#: Between two looks at the folder.
LOOK_SECONDS = 1.0


class OutputLost(RuntimeError):
    """The output folder was moved or deleted while the run wrote to it."""


class ResultsNotWritten(RuntimeError):
    """Training is complete, but a file of the results could not be written."""


class OutputFolder:
    """The folder that rank 0 writes to.

    Args:
        describe: writes ``run.yaml`` and the other files that describe the run.
    """

    def __init__(
        self, path: Path, log: MetricsLog, lock: Lock, describe: Callable[[], None]
    ) -> None:
        self._path, self._log, self._lock, self._describe = path, log, lock, describe
        self._identity = self._look()
        self._look_at = 0.0

    def check(
        self,
        warn: Callable[[str], None],
        save: Callable[[], None],
        wait: Callable[[], None],
        *,
        now: bool = False,
    ) -> None:
        """Look whether the folder and ``metrics.jsonl`` are in their place.

        A deleted ``metrics.jsonl`` is written again with all its lines. If the folder is gone, all
        that resuming needs is written to a new one.

        Args:
            save: asks for a checkpoint of now.
            wait: waits until it is written.
            now: look even if the last look was a moment ago.

        Raises:
            OutputLost: the folder is gone; says what to do.
        """
        if not now and time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        if self._look() != self._identity or not (self._path / "run.yaml").exists():
            self._write_again(save, wait)
        with contextlib.suppress(OSError):  # unless_full tells of a disk that takes nothing
            if self._log.restore():
                warn(f"{self._log.path} was deleted or moved; written again with all its lines")

    def _look(self) -> tuple[int, int] | None:
        """What tells this folder from another one of its name."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _write_again(self, save: Callable[[], None], wait: Callable[[], None]) -> None:
        before = f"output_dir {self._path} was moved or deleted while the run was writing to it"
        try:
            (self._path / "logs").mkdir(parents=True, exist_ok=True)
            self._log.restore()
            self._describe()
            self._lock.confirm()
            save()
            wait()
        except OSError as error:
            raise OutputLost(f"{before}, and cannot be written again: {error}") from None
        saved = checkpoint_names(self._path)
        where = f"checkpoint {saved[-1]} and all metrics" if saved else "all metrics"
        raise OutputLost(
            f"{before}; {where} were written to a new {self._path}. Run the same command to "
            "resume from there, or first move the old folder back if it has more"
        )


@contextlib.contextmanager
def results_can_be_written_later(output: Path) -> Iterator[None]:
    """Name the file that cannot be written after training, and what to do.

    Raises:
        ResultsNotWritten: in place of any ``OSError``.
    """
    try:
        yield
    except OSError as error:
        saved = checkpoint_names(output)
        newest = f", and the newest checkpoint is {saved[-1]}" if saved else ""
        raise ResultsNotWritten(
            f"{error.filename or output}: cannot be written ({error.strerror or error}). Training "
            f"is complete{newest}: free space or make the file writable, then run the same command "
            "to write the results"
        ) from error
