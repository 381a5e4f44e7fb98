"""Decide the state of a run: waiting, running, finished, failed, stopped or dead."""

from __future__ import annotations

import datetime
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.exit_report import KILLED
from launch.run_logs import (
    LogTail,
    failed_without_summary,
    failure_log,
    launcher_verdict,
    refusal,
)
from launch.slurm_queue import JobState
from trainer.checkpointing.run_lock import LOCK, LockState, lock_state
from trainer.config.ranking import Entry
from trainer.reporting.summary import SUMMARY_FILE, RunSummary
from trainer.runtime import stop_signals
from trainer.runtime.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESUMABLE, BadInput
from trainer.runtime.json_file import read_json_object
from trainer.tracking.metrics_log import METRICS_FILE
from trainer.tracking.progress_file import missing_results
from trainer.tracking.store_uri import sync_command

#: Files that exist, with the launcher's process in them, from its start until rank 0 has finished.
LAUNCHER_MARKS = ("launcher.unfinished", "launcher-host0.unfinished")
_RANK_COMMAND = "deepspeed --module trainer "
#: Exit code of ``status --watch`` by the state in which a run ends.
EXIT_BY_STATE = {
    "finished": EXIT_DONE,
    "stopped": EXIT_RESUMABLE,
    "failed": EXIT_FAILURE,
    "dead": EXIT_FAILURE,
    "unknown": EXIT_FAILURE,
}


@dataclass
class Process:
    """The process that holds, or held, the lock of the output folder.

    Attributes:
        since: time at which it took the lock, in ISO 8601.
        heartbeat_seconds: seconds since its last heartbeat; None if unknown.
        restarts: number of times that Slurm requeued the job.
        dead: why the process is certainly dead; None if it may be alive.
    """

    host: str
    pid: int
    since: str
    job: str | None
    restarts: int
    heartbeat_seconds: float | None
    dead: str | None


@dataclass
class PromptStatus:
    """Progress of one prompt.

    Attributes:
        metric: the task's metric, by which validations are ranked.
        step, steps: newest and last step.
        best: validation scores of the best step so far.
        stopped: why training of the prompt has ended; None if it has not.
    """

    name: str
    task: str
    metric: str
    num_virtual_tokens: int
    step: int
    steps: int
    train_loss: float | None = None
    best: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped: str | None = None
    teacher: str | None = None

    @property
    def entry(self) -> Entry:
        """The prompt's place in the ranking of its task."""
        return Entry(
            name=self.name,
            scores=self.best,
            num_virtual_tokens=self.num_virtual_tokens,
            teacher=self.teacher,
            eliminated=self.stopped == "halving",
            diverged=self.stopped == "diverged",
        )


@dataclass
class Status:
    """Status of one run.

    Attributes:
        state: ``waiting`` (in Slurm), ``running``, ``finished``, ``failed``, ``stopped`` (it can
            be resumed) or ``dead`` (its process ended without recording why); ``array`` for a job
            array; ``unknown`` for a damaged folder.
        steps: total number of steps; None without a run file.
        eta_seconds: time until the last step, from the pace of recent steps; None unless running.
        written: time of the last metrics, in Unix seconds.
        metrics: prompt -> metric -> (step, latest value).
        resume: command that resumes or restarts the run; empty if it is not known.
        log: last lines of the log that explains a failure.
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
    process: Process | None = None
    prompts: list[PromptStatus] = field(default_factory=list)
    tokens_per_second: float | None = None
    resume: str = ""
    error: str = ""
    log: LogTail | None = None

    @property
    def exit_code(self) -> int | None:
        """Exit code of ``status --watch``; None while the run is running or waiting."""
        if self.state != "array":
            return EXIT_BY_STATE.get(self.state)
        codes = {task.exit_code for task in self.tasks}
        return next((code for code in (None, EXIT_FAILURE, EXIT_RESUMABLE) if code in codes), 0)


def judge(status: Status, summary: RunSummary | None, lock: LockState | None) -> None:
    """Set state, description, error, log and the command to resume."""
    job, run_dir = status.job, Path(status.run_dir)
    ending = summary.status if summary else "unfinished"
    alive = lock is not None and lock.dead is None
    if (
        job is not None
        and job.active
        and job.state not in ("RUNNING", "COMPLETING")
        and not (alive and job.reason == "Dependency")  # on the job that holds the lock
    ):
        why = f" ({job.reason})" if job.reason not in ("", "None") else ""
        status.state, status.description = "waiting", f"waiting in Slurm: {job.state.lower()}{why}"
    elif alive:
        phase = "" if status.step else "; loading, no step yet"
        if ending == "finished":
            phase = "; training is finished, sending results"
        status.state, status.description = "running", f"running: {_holder(lock)}{phase}"
    elif job is not None and job.state == "RUNNING" and ending != "finished":
        status.state, status.description = "running", f"running on {job.nodes}; starting"
    elif job is not None and job.state == "COMPLETING" and ending == "unfinished":
        # its processes have ended; it may be requeued
        status.state, status.description = "running", f"running: Slurm job {job.id} is completing"
    elif launcher_runs(run_dir):
        phase = "ending its processes" if _wrote_since_start(run_dir) else "starting its processes"
        status.state, status.description = "running", f"running: {phase}"
    elif summary and ending == "finished":
        status.state, status.description = (
            "finished",
            f"finished at step {summary.steps or status.step}",
        )
        if missing := missing_results(run_dir):
            status.description += f"; {missing} missing, run: {sync_command(run_dir)}"
    else:
        _judge_unfinished(status, summary, lock)


def _judge_unfinished(status: Status, summary: RunSummary | None, lock: LockState | None) -> None:
    """Set the fields of ``judge`` for a run that has not finished and is not running."""
    job, run_dir = status.job, Path(status.run_dir)
    ended = f"; job {job.id} ended: {job}" if job and job.state != "UNKNOWN" else ""
    refused = refusal(run_dir)
    verdict = "" if refused else launcher_verdict(run_dir)
    if lock is not None and not _ended_after(run_dir / SUMMARY_FILE, lock):
        how = str(lock.dead)
        if lock.holder is not None:
            how += f" ({_holder(lock)}, {_last_heartbeat(status.process)})"
        status.state, status.description = "dead", f"dead: {how}"
    elif summary is not None and summary.status == "failed":
        status.state, status.error = "failed", summary.error or "unknown error"
    elif error := failed_without_summary(run_dir):
        status.state, status.error = "failed", error
    elif refused and status.checkpoint is None:
        status.state, status.error = "failed", refused
    else:
        status.state, status.description, verdict = "stopped", "stopped", ""
        if refused:  # an earlier start can be resumed
            status.description += f"; the last start was refused: {refused}"
    if status.state == "failed":
        status.error = next(iter(status.error.strip().splitlines()), "")
        if KILLED in verdict:  # the other ranks only report that a connection was closed
            status.error = verdict
        status.description = f"failed: {status.error}"
    if status.state == "dead" or (status.state == "failed" and status.error != refused):
        status.log = failure_log(run_dir)
    status.resume = _resume_command(run_dir)
    rerun = "rerun the command to start over"
    if status.checkpoint is not None:
        rerun = f"rerun the command to resume from step {status.checkpoint}"
    how = f"; {verdict}" if verdict and verdict != status.error else ""
    status.description += f"{how}{ended}; {rerun}"


def _holder(lock: LockState | None) -> str:
    if lock is None or lock.holder is None:
        return f"an unknown process ({LOCK} is damaged)"
    restarts = f", restart {lock.holder.restarts}" if lock.holder.restarts else ""
    return f"{lock.holder} since {_local_time(lock.holder.since)}{restarts}"


def _last_heartbeat(process: Process | None) -> str:
    if process is None or process.heartbeat_seconds is None:
        return "last heartbeat unknown"
    at = time.time() - process.heartbeat_seconds
    return f"last heartbeat {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}"


def _local_time(text: str) -> str:
    """Convert an ISO 8601 time to local time; return other text unchanged."""
    try:
        return datetime.datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return text


def holder_process(lock: LockState | None) -> Process | None:
    if lock is None or lock.holder is None:
        return None
    holder = lock.holder
    age = None if lock.touched is None else max(0.0, time.time() - lock.touched)
    return Process(
        holder.host, holder.pid, holder.since, holder.job, holder.restarts, age, lock.dead
    )


def _ended_after(summary: Path, lock: LockState) -> bool:
    """Whether a summary was written by the holder of a lock, not by an earlier process."""
    try:
        return lock.holder is not None and summary.stat().st_mtime >= (
            datetime.datetime.fromisoformat(lock.holder.since).timestamp()
        )
    except (OSError, ValueError, OverflowError):
        return False


def launcher_runs(run_dir: Path) -> bool:
    """Whether ``promptshard train`` runs, also before and after its ranks hold the lock.

    If it runs on another host, that is known only for some time after its start.
    """
    marks = (lock_state(run_dir / "logs" / name) for name in LAUNCHER_MARKS)
    return any(mark is not None and mark.dead is None for mark in marks)


def _wrote_since_start(run_dir: Path) -> bool:
    """Whether the ranks have taken the lock, or were stopped, since the launcher's start."""
    changed = []
    for names in (
        [METRICS_FILE, SUMMARY_FILE, LOCK, f"logs/{stop_signals.FILE}"],
        [f"logs/{name}" for name in LAUNCHER_MARKS],
    ):
        times = [0.0]
        for name in names:
            with suppress(OSError):
                times.append((run_dir / name).stat().st_mtime)
        changed.append(max(times))
    return changed[0] > changed[1]


def _resume_command(run_dir: Path) -> str:
    """Return the command that resumes a run, from ``environment.json``; empty if unknown."""
    try:
        environment = read_json_object(run_dir / "environment.json")
    except BadInput:
        return ""
    command, ranks = environment.get("command"), environment.get("world_size")
    if not isinstance(command, str) or not command.startswith(_RANK_COMMAND):
        return ""
    words, options = command.removeprefix(_RANK_COMMAND), environment.get("start_options")
    if isinstance(options, str):
        words += f" {options}".rstrip()
    elif isinstance(ranks, int) and ranks != 2 and str(environment.get("device")).startswith("cpu"):
        words += f" --processes {ranks}"
    return f"promptshard train {words}"
