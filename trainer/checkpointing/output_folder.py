"""Archive an earlier run's output folder, and handle a folder that is moved, deleted or full."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.checkpointing.checkpoint_names import newest_checkpoint
from trainer.checkpointing.run_lock import LOCK, Lock
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.process import rerun
from trainer.tracking import MetricsLog
from trainer.tracking.metrics_log import SYSTEM_FILE

CHECK_SECONDS = 1.0
#: Holds the ID of the Slurm job that archived an earlier run.
ARCHIVED_BY = Path("logs", "put-aside-by-job")
#: Marks an archive folder into which files are still being moved.
MOVING = ".moving"


class OutputLost(RuntimeError):
    """The output folder was moved or deleted while the run wrote to it."""


class ResultsNotWritten(RuntimeError):
    """Training is complete, but a file of the results could not be written."""


def was_archived(output: Path) -> bool:
    """Whether this Slurm job archived an earlier run before it was requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    try:
        return (output / ARCHIVED_BY).read_text() == job
    except OSError:
        return False


def archive_earlier_run(output: Path, console: Console) -> None:
    """Move an earlier run to ``OUTPUT.N``; nothing is deleted."""
    kept = ("logs", "lint", LOCK)  # measured instructions do not depend on the run
    if entries := [path for path in output.iterdir() if path.name not in kept]:
        _move_to_archive(output, entries, console)
    if job := os.environ.get("SLURM_JOB_ID"):
        (output / ARCHIVED_BY).parent.mkdir(exist_ok=True)
        atomic_io.write(output / ARCHIVED_BY, job)


def _move_to_archive(output: Path, entries: Sequence[Path], console: Console) -> None:
    """Move entries of the folder; after an interruption, the next call moves the rest.

    ``run.yaml`` is moved last: as long as it exists, the folder counts as a run's.
    """
    if not (output / "run.yaml").exists():
        raise BadInput(f"--fresh: {output} is not a run directory; give another output_dir")
    entries = sorted(entries, key=lambda path: path.name == "run.yaml")
    system_metrics = output / SYSTEM_FILE  # this start already writes to the other logs
    number = 1
    while (archive := output.with_name(f"{output.name}.{number}")).exists():
        if (archive / MOVING).exists() and not any((archive / p.name).exists() for p in entries):
            break
        number += 1
    archive.mkdir(exist_ok=True)
    (archive / MOVING).touch()
    if system_metrics.exists():
        (archive / SYSTEM_FILE).parent.mkdir(exist_ok=True)
        shutil.move(str(system_metrics), archive / SYSTEM_FILE)
    for path in entries:
        shutil.move(str(path), archive / path.name)
    (archive / MOVING).unlink()
    console.print(f"moved an earlier run to {archive}")


class OutputFolder:
    """The output folder of a run, on rank 0; ``describe`` writes ``run.yaml`` and similar files."""

    def __init__(
        self, path: Path, log: MetricsLog, lock: Lock, describe: Callable[[], None]
    ) -> None:
        self._path, self._log, self._lock, self._describe = path, log, lock, describe
        self._identity = self._inode()
        self._next_check = 0.0

    def check(
        self,
        warn: Callable[[str], None],
        save: Callable[[], None],
        wait: Callable[[], None],
        *,
        now: bool = False,
    ) -> None:
        """Check that the folder and ``metrics.jsonl`` still exist.

        A deleted ``metrics.jsonl`` is written again with all its lines. If the folder is gone,
        everything that resuming needs is written to a new one.

        Args:
            save: requests a checkpoint of the current step.
            wait: waits until it is written.
            now: check even if the last check was a moment ago.

        Raises:
            OutputLost: the folder is gone; the message has the remedy.
        """
        if not now and time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + CHECK_SECONDS
        if self._inode() != self._identity or not (self._path / "run.yaml").exists():
            self._write_again(save, wait)
        with contextlib.suppress(OSError):  # MetricsCallback warns about a full disk
            if self._log.restore():
                warn(f"{self._log.path} was deleted or moved; written again with all its lines")

    def _inode(self) -> tuple[int, int] | None:
        """Return the folder's identity, which differs for another folder of the same name."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _write_again(self, save: Callable[[], None], wait: Callable[[], None]) -> None:
        problem = f"output_dir {self._path} was moved or deleted while the run was writing to it"
        try:
            (self._path / "logs").mkdir(parents=True, exist_ok=True)
            self._log.restore()
            self._describe()
            self._lock.confirm()
            save()
            wait()
        except OSError as error:
            raise OutputLost(f"{problem}, and cannot be written again: {error}") from None
        newest = newest_checkpoint(self._path)
        what = f"checkpoint {newest} and all metrics" if newest else "all metrics"
        raise OutputLost(
            f"{problem}; {what} were written to a new {self._path}. {rerun()} to resume from "
            "there, or first move the old folder back if it has more"
        )


@contextlib.contextmanager
def results_can_be_written_later(output: Path) -> Iterator[None]:
    """Replace an ``OSError`` after training by ``ResultsNotWritten``, which has the remedy."""
    try:
        yield
    except OSError as error:
        newest = newest_checkpoint(output)
        if newest:
            saved, then = f". The newest checkpoint is {newest}", "resume and write the results"
        else:
            saved, then = ", but no checkpoint was saved", "train again"
        raise ResultsNotWritten(
            f"{error.filename or output}: cannot be written ({error.strerror or error}). Training "
            f"is complete{saved}. Free space or make the file writable. {rerun()} to {then}"
        ) from error
