"""Look up the Slurm jobs of an output folder: its submission records, squeue(1) and sacct(1)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from launch.submit import RECORD, SUBMITTED
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

SLURM_SECONDS = 30
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

    def __str__(self) -> str:
        return self.state if self.reason in ("", "None") else f"{self.state} ({self.reason})"


class SubmissionRecord(BaseModel):
    """``job.json`` of a submission; ``cluster`` is empty for the default one."""

    job: str = ""
    cluster: str = ""
    command: str = ""
    tasks: list[str] = []


def read_record(run_dir: Path) -> tuple[SubmissionRecord, Path]:
    """Return the newest submission and its folder; an empty record if missing or damaged."""
    submitted = run_dir / SUBMITTED
    records = filter(Path.exists, submitted.glob(f"*/{RECORD}"))  # not a dangling symlink
    path = max(records, key=lambda path: path.stat().st_mtime, default=submitted / RECORD)
    try:
        return SubmissionRecord.model_validate(read_json_object(path)), path.parent
    except (BadInput, ValidationError):
        return SubmissionRecord(), path.parent


def last_job(run_dir: Path) -> JobState | None:
    """Return the job last submitted for a folder; for an array, the state of an active task."""
    record, _ = read_record(run_dir)
    if not record.job:
        return None
    jobs = [*(query_jobs(record.job, record.cluster) or {}).values()]
    job = next((job for job in jobs if job.active), jobs[-1] if jobs else state_of(record.job, {}))
    return replace(job, id=record.job)


def find_job(run_dir: Path, record: SubmissionRecord) -> tuple[str, SubmissionRecord]:
    """Return the job or array task that runs in this folder, and the record of its submission.

    Both are empty without a submission. An array is submitted for the parent of its tasks' folders.

    Args:
        record: the newest submission for the folder itself.
    """
    if record.job:
        return record.job, record
    around, _ = read_record(run_dir.absolute().parent)
    for i, task in enumerate(around.tasks):
        if around.job and resolved(task) == resolved(run_dir):
            return f"{around.job}_{i}", around
    return "", record


def resolved(path: str | Path) -> str:
    """Return the real path; empty for one that no file can have."""
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL byte
        return ""


def query_jobs(number: str, cluster: str = "") -> dict[str, JobState] | None:
    """Query squeue, then sacct, for a job, an array task or all tasks of an array.

    Args:
        cluster: the cluster of the job; empty: the default one.

    Returns:
        The state of each job that Slurm knows, by its ID: ``JOB``, ``JOB_TASK`` for an array task,
        or ``JOB_*`` for all tasks that have never started. None if Slurm does not answer.
    """
    job = [f"--jobs={number}", *([f"--clusters={cluster}"] if cluster else [])]
    queued = _queued(*job)
    if queued and number in queued:
        return queued
    lines = _slurm(
        *("sacct", "--noheader", "--parsable2", "--allocations", *job),
        "--format=JobID,State,ExitCode,NodeList",
    )
    jobs = {}
    for name, state, code, nodes in _fields(lines or [], 4):
        name = re.sub(r"\[.*", "*", name)
        jobs[name] = JobState(name, state.split(" ")[0], f"exit code {code}", nodes)
    return None if queued is None and not jobs else jobs | (queued or {})


def active_jobs() -> dict[str, JobState]:
    """Return all jobs in the queue by ID; an array task's is ``JOB_TASK``. One call of squeue."""
    return _queued() or {}


def state_of(number: str, jobs: Mapping[str, JobState]) -> JobState:
    """Return the state of a job or array task, from those that Slurm knows."""
    everything = re.sub(r"_.*", "_*", number)
    unknown = "Slurm is not installed here, does not answer, or does not know the job"
    return jobs.get(number) or jobs.get(everything) or JobState(number, "UNKNOWN", unknown)


def _queued(*options: str) -> dict[str, JobState] | None:
    """Return jobs of squeue by ID; None if it does not answer."""
    lines = _slurm("squeue", "--noheader", "--array", *options, "--format=%i|%T|%r|%N|%L")
    if lines is None:
        return None
    return {number: JobState(number, *rest) for number, *rest in _fields(lines, 5)}


def _fields(lines: Iterable[str], count: int) -> Iterator[list[str]]:
    """Yield the fields of a table's lines, without other lines, such as the name of a cluster."""
    for line in lines:
        if line.count("|") == count - 1:
            yield [part.strip() for part in line.split("|")]


def _slurm(*command: str) -> list[str] | None:
    """Return the output of a command; None if Slurm does not answer."""
    if shutil.which(command[0]) is None:
        return []
    # these variables would hide jobs
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SLURM_SECONDS,
            check=False,
        )
    except (subprocess.TimeoutExpired, ValueError):  # ValueError: a NUL byte in a damaged record
        return None
    if done.returncode != 0:
        return [] if "Invalid job id" in done.stderr else None
    return done.stdout.splitlines()
