"""Look up the Slurm jobs of an output folder: its submission records, squeue(1) and sacct(1)."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
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
    """``job.json`` of a submission."""

    job: str = ""
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
    """Return the job (or first array task) last submitted for a folder."""
    record, _ = read_record(run_dir)
    return query_job(record.job) if record.job else None


def find_job(run_dir: Path, record: SubmissionRecord) -> tuple[str, str]:
    """Return the job or array task that runs in this folder, and the command that submitted it.

    Both are empty without a submission. An array is submitted for the parent of its tasks' folders.

    Args:
        record: the newest submission for the folder itself.
    """
    if record.job:
        return record.job, record.command
    around, _ = read_record(run_dir.absolute().parent)
    for i, task in enumerate(around.tasks):
        if around.job and resolved(task) == resolved(run_dir):
            return f"{around.job}_{i}", around.command
    return "", ""


def resolved(path: str | Path) -> str:
    """Return the real path; empty for one that no file can have."""
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL byte
        return ""


def query_job(number: str) -> JobState:
    """Query squeue, then sacct, for a job."""
    shown = _slurm("squeue", "--noheader", f"--jobs={number}", "--format=%T|%r|%N|%L")
    if shown and shown[0].count("|") == 3:
        return JobState(number, *(part.strip() for part in shown[0].split("|")))
    shown = _slurm(
        *("sacct", "--noheader", "--parsable2", "--allocations"),
        *(f"--jobs={number}", "--format=State,ExitCode,NodeList"),
    )
    if shown and shown[-1].count("|") == 2:
        state, code, nodes = shown[-1].split("|")
        return JobState(number, state.split(" ")[0], f"exit code {code}", nodes)
    return JobState(number, "UNKNOWN", "Slurm is not installed here, or does not know the job")


def active_jobs() -> dict[str, JobState]:
    """Return all jobs in the queue by ID; an array task's is ``JOB_TASK``. One call of squeue."""
    lines = _slurm("squeue", "--noheader", "--array", "--format=%i|%T|%r|%N|%L")
    parts = [[part.strip() for part in line.split("|")] for line in lines if line.count("|") == 4]
    return {number: JobState(number, *rest) for number, *rest in parts}


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
