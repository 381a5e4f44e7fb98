"""Read the status of a run from its output folder and from Slurm.

Nothing is written, so it also works during the run, from any machine that has access to the folder.
Files may be damaged or untrusted: each is parsed into a model, or counts as missing.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ValidationError

from launch import preflight
from launch.submit import RECORD, SUBMITTED
from trainer.checkpointing.checkpoint_names import checkpoint_names
from trainer.checkpointing.run_lock import running_process
from trainer.config import RunConfig, check_path, load
from trainer.reporting.summary import RunSummary, load_summary
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object
from trainer.tracking.metrics_log import METRICS_FILE, read_lines
from trainer.tracking.progress_file import missing_results
from trainer.tracking.store_uri import sync_command

SLURM_SECONDS = 30
#: A gap longer than this many median step times is a pause, in which the run was stopped.
PAUSE = 20
#: The ETA is computed from this many latest steps.
RECENT = 200
#: Final states of a job in squeue(1) and sacct(1).
FINAL_STATES = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", "UNKNOWN"),
)


@dataclass(frozen=True)
class JobState:
    """State of a Slurm job.

    Attributes:
        state: Slurm's name; ``UNKNOWN`` if Slurm is not installed or does not know the job.
        reason: why the job is pending, or how it ended.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    time_left: str = ""

    @property
    def active(self) -> bool:
        return self.state not in FINAL_STATES


@dataclass
class Status:
    """Status of one run.

    Attributes:
        state: ``waiting``, ``running``, ``finished``, ``failed`` or ``not finished``; ``array`` for
            a job array; ``unknown`` for a damaged folder of an array task.
        steps: total number of steps; None without a run file.
        eta_seconds: time until the last step, from the pace of recent steps; None unless running.
        written: time of the last metrics, in Unix seconds.
        metrics: prompt -> metric -> (step, latest value).
    """

    run_dir: str
    state: str = ""
    description: str = ""
    job: JobState | None = None
    step: int = 0
    steps: int | None = None
    eta_seconds: float | None = None
    written: float | None = None
    metrics: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    checkpoint: int | None = None
    stopped: dict[str, str] = field(default_factory=dict)
    tasks: list[Status] = field(default_factory=list)


def read_status(run_dir: Path) -> Status:
    """Read an output folder and query Slurm for the job last submitted for it.

    Raises:
        BadInput: ``run_dir`` is not an output folder.
    """
    preflight.check_folder(str(run_dir))
    record, folder = _record(run_dir)
    here = _resolved(run_dir)
    if len(record.tasks) > 1 and here not in map(_resolved, record.tasks):
        description = f"job array {record.job}, {len(record.tasks)} tasks"
        status = Status(str(run_dir), "array", description)
        for i, task in enumerate(record.tasks):
            status.tasks.append(_task(Path(task), query_job(f"{record.job}_{i}")))
        return status
    job = query_job(record.job) if record.job else _array_job(run_dir)
    return _run(run_dir, job, folder / "run.yaml")


def last_job(run_dir: Path) -> JobState | None:
    """Return the job (or first array task) last submitted for a folder."""
    record, _ = _record(run_dir)
    return query_job(record.job) if record.job else None


def _task(run_dir: Path, job: JobState) -> Status:
    """Return the status of one array task; a damaged folder must not hide the other tasks."""
    try:
        check_path(str(run_dir))
        return _run(run_dir, job, None)
    except ValueError as error:
        return Status(str(run_dir), "unknown", str(error))


def _run(run_dir: Path, job: JobState | None, frozen: Path | None) -> Status:
    status = Status(str(run_dir), job=job)
    config = _config(run_dir, frozen, expected=job is not None)
    status.steps = config.last_step if config else None
    _read_metrics(status, run_dir / METRICS_FILE)
    steps = (int(name.rpartition("-")[2]) for name in checkpoint_names(run_dir))
    status.checkpoint = max(steps, default=None)
    summary = load_summary(run_dir)
    for name, result in summary.prompts.items() if summary else ():
        status.stopped[name] = result.stopped.reason if result.stopped else "finished"
    status.state, status.description = _judge(status, summary, running_process(run_dir))
    if status.state == "finished" and (missing := missing_results(run_dir)):
        status.description += f"; {missing} missing, run: {sync_command(run_dir)}"
    if status.state != "running":
        status.eta_seconds = None
    return status


def _judge(status: Status, summary: RunSummary | None, process: str | None) -> tuple[str, str]:
    """Return state and description; ``process`` describes the holder of the folder's lock."""
    job = status.job
    ending = summary.status if summary else "unfinished"
    rerun = "rerun the command to start over"
    if status.checkpoint is not None:
        rerun = f"rerun the command to resume from step {status.checkpoint}"
    if job is not None and job.active and job.state != "RUNNING":
        why = f" ({job.reason})" if job.reason not in ("", "None") else ""
        return "waiting", f"{job.state.lower()}{why}"
    if job is not None and job.active and ending != "finished":
        return "running", f"running on {job.nodes}"
    if process is not None:
        return "running", f"running: {process}"
    if summary and ending == "finished":
        return "finished", f"finished at step {summary.steps or status.step}"
    ended = f"; job {job.id} ended: {describe_job(job)}" if job and job.state != "UNKNOWN" else ""
    if summary and ending == "failed":
        return "failed", f"failed: {summary.error}{ended}; {rerun}"
    return "not finished", f"not finished and not running{ended}; {rerun}"


def describe_job(job: JobState) -> str:
    return job.state if job.reason in ("", "None") else f"{job.state} ({job.reason})"


def query_job(number: str) -> JobState:
    """Query squeue, then sacct, for a job."""
    shown = _slurm("squeue", "--noheader", f"--jobs={number}", "--format=%T|%r|%N|%L")
    if shown and shown[0].count("|") == 3:
        state, reason, nodes, left = (part.strip() for part in shown[0].split("|"))
        return JobState(number, state, reason, nodes, left)
    shown = _slurm(
        *("sacct", "--noheader", "--parsable2", "--allocations"),
        *(f"--jobs={number}", "--format=State,ExitCode,NodeList"),
    )
    if shown and shown[-1].count("|") == 2:
        state, code, nodes = shown[-1].split("|")
        return JobState(number, state.split(" ")[0], f"exit code {code}", nodes)
    return JobState(number, "UNKNOWN", "Slurm is not installed here, or does not know the job")


def _slurm(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return []
    return [line for line in done.stdout.splitlines() if line] if done.returncode == 0 else []


class SubmissionRecord(BaseModel):
    """``job.json`` of a submission."""

    job: str = ""
    tasks: list[str] = []


def _record(run_dir: Path) -> tuple[SubmissionRecord, Path]:
    """Return the newest submission and its folder; an empty record if missing or damaged."""
    submitted = run_dir / SUBMITTED
    records = filter(Path.exists, submitted.glob(f"*/{RECORD}"))  # not a dangling symlink
    path = max(records, key=lambda path: path.stat().st_mtime, default=submitted / RECORD)
    try:
        return SubmissionRecord.model_validate(read_json_object(path)), path.parent
    except (BadInput, ValidationError):
        return SubmissionRecord(), path.parent


def _resolved(path: str | Path) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL byte
        return ""


def _array_job(run_dir: Path) -> JobState | None:
    """Return the array task of this folder, if a job array was submitted for its parent."""
    around, _ = _record(run_dir.absolute().parent)
    for i, task in enumerate(around.tasks):
        if around.job and _resolved(task) == _resolved(run_dir):
            return query_job(f"{around.job}_{i}")
    return None


def _config(run_dir: Path, frozen: Path | None, *, expected: bool) -> RunConfig | None:
    """Load the run file that the run has saved or, before it has started, the submitted one."""
    for path in (run_dir / "run.yaml", frozen):
        if path is not None and path.is_file():
            return load(path)
    return None if expected else preflight.check_result(str(run_dir))


def _read_metrics(status: Status, path: Path) -> None:
    times: dict[int, float] = {}
    try:
        for line, _ in read_lines(path):
            if line is None or not math.isfinite(line.time):
                continue
            times[line.step] = line.time
            if line.prompt is not None:
                latest = status.metrics.setdefault(line.prompt, {})
                latest |= {name: (line.step, value) for name, value in line.metrics.items()}
    except OSError:  # a folder, or not readable
        pass
    if not times:
        return
    status.step, status.written = max(times), max(times.values())
    pace = _pace([times[step] for step in sorted(times)[-RECENT:]])
    if pace is not None and status.steps is not None:
        status.eta_seconds = pace * max(0, status.steps - status.step)


def _pace(times: Sequence[float]) -> float | None:
    """Return the mean seconds per step, including validation, excluding pauses."""
    gaps = [after - before for before, after in itertools.pairwise(times)]
    if not gaps:
        return None
    limit = PAUSE * statistics.median(gaps)
    return statistics.fmean([seconds for seconds in gaps if seconds <= limit] or gaps)
