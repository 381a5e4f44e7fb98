"""Find the output folders of runs below a folder, and read the status of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from launch.run_logs import LAUNCHER_LOGS
from launch.run_state import Status
from launch.slurm_queue import JobState, active_jobs
from launch.status import StatusReader
from launch.submit import SUBMITTED
from trainer.checkpointing.run_lock import LOCK
from trainer.reporting.summary import SUMMARY_FILE
from trainer.runtime.errors import BadInput
from trainer.tracking.metrics_log import METRICS_FILE

#: Levels of folders below the given one that are searched.
MAX_DEPTH = 8
#: Files of an output folder. One of them alone may be another program's file.
RUN_FILES = frozenset(("run.yaml", METRICS_FILE, SUMMARY_FILE, "environment.json"))
#: Folders with many files and no runs; also skipped: hidden folders and virtual environments.
SKIPPED = frozenset(("node_modules", "__pycache__", "site-packages", "checkpoints", "mlruns"))


def list_runs(folder: Path, on_run: Callable[[int], None] = lambda number: None) -> list[Status]:
    """Read the status of all runs below a folder, newest first.

    A run that cannot be read is listed with state ``unknown`` and the reason.

    Args:
        on_run: called after each run with the number of runs so far.

    Raises:
        BadInput: the folder is missing or cannot be read.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise BadInput(f"{folder}: {what}; give a folder that contains runs")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror})") from None
    jobs: dict[str, JobState] | None = None
    runs = []
    for number, run_dir in enumerate(find_runs(folder), 1):
        if jobs is None:
            jobs = active_jobs()
        runs.append(_read(run_dir, jobs))
        on_run(number)
    return sorted(runs, key=lambda run: run.written or 0.0, reverse=True)


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the output folders of runs at or below a folder, without looking inside them.

    Symbolic links are followed; each folder is visited once, so loops are harmless.
    """
    seen: set[tuple[int, int]] = set()
    folders = [(folder, 0)]
    while folders:
        path, depth = folders.pop()
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                names = {entry.name: entry for entry in entries}
            if _is_run(path, names):
                yield path
                continue
            if depth < MAX_DEPTH and "pyvenv.cfg" not in names:
                below = [
                    path / name
                    for name, entry in names.items()
                    if not name.startswith(".") and name not in SKIPPED and entry.is_dir()
                ]
                folders += [(inner, depth + 1) for inner in below]
        except OSError:  # unreadable, or deleted since it was listed
            continue


def _is_run(path: Path, names: dict[str, os.DirEntry[str]]) -> bool:
    """Whether a folder is the output folder of a run, also of one that has just been started."""
    if LOCK in names or len(RUN_FILES & names.keys()) > 1:
        return True
    if "logs" not in names:
        return False
    if any(any((path / "logs").glob(pattern)) for pattern in LAUNCHER_LOGS):
        return True
    # submitted to Slurm and not started; the folder of a job array contains the runs of its tasks
    frozen = (path / SUBMITTED).glob("*/run.yaml")
    return any(frozen)


def _read(run_dir: Path, jobs: dict[str, JobState]) -> Status:
    try:
        run = StatusReader(run_dir, jobs).read(quick=True)
    except (BadInput, OSError) as error:
        run = Status(str(run_dir), "unknown", str(error).split("\n")[0])
    if run.written is None:
        run.written = _changed(run_dir)
    return run


def _changed(run_dir: Path) -> float | None:
    """Return the time of the last results or metrics, else of the last change in the folder."""
    for paths in ((SUMMARY_FILE, METRICS_FILE), ("logs", "")):
        times = []
        for name in paths:
            with suppress(OSError):
                times.append((run_dir / name).stat().st_mtime)
        if times:
            return max(times)
    return None
