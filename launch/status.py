"""Where a run stands, from its output folder and, where there is one, from Slurm.

Reads only: it may be called from any machine that sees the folder, while the run goes on.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch import preflight
from launch.submit import RECORD, SUBMITTED
from trainer.config import RunConfig, load
from trainer.errors import BadInput
from trainer.names import checkpoint_names
from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines

SLURM_SECONDS = 30
#: A step that took so many times the median was no step: the run was stopped in between.
PAUSE = 20
#: Steps that the time left is reckoned from.
RECENT = 200
#: States of a job that is over, of squeue(1) and sacct(1); the others may still train.
OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", "UNKNOWN"),
)


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job.

    Attributes:
        state: its own word; ``UNKNOWN`` where Slurm cannot be asked or has forgotten it.
        reason: why it waits, or how it ended.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    time_left: str = ""

    @property
    def lives(self) -> bool:
        return self.state not in OVER


@dataclass
class Status:
    """One run.

    Attributes:
        state: ``waiting``, ``running``, ``finished``, ``failed`` or ``not finished``.
        said: the same in a sentence.
        steps: of how many; None if no run file is there.
        eta_seconds: until the last step, at the pace of the last ones.
        written: when the folder's metrics were last written, unix seconds.
        metrics: last value of every metric of every prompt, each with its step.
        checkpoint: step of the newest checkpoint.
        tasks: of a job array, the runs of its tasks.
    """

    run_dir: str
    state: str = ""
    said: str = ""
    job: JobState | None = None
    step: int = 0
    steps: int | None = None
    eta_seconds: float | None = None
    written: float | None = None
    metrics: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    checkpoint: int | None = None
    stopped: dict[str, str] = field(default_factory=dict)
    tasks: list[Status] = field(default_factory=list)


def look(run_dir: Path) -> Status:
    """Read an output folder and ask Slurm about the job that was last submitted for it.

    Raises:
        BadInput: if it is no output folder.
    """
    if not run_dir.is_dir():
        raise BadInput(f"{run_dir}: no such folder; give the output_dir of a run")
    record = _record(run_dir)
    tasks = [Path(task) for task in (record or {}).get("tasks", [])]
    if len(tasks) > 1 and run_dir.resolve() not in [task.resolve() for task in tasks]:
        assert record is not None
        status = Status(str(run_dir), "array", f"job array {record['job']}, {len(tasks)} tasks")
        for i, task in enumerate(tasks):
            status.tasks.append(_run(task, ask(f"{record['job']}_{i}"), None))
        return status
    job = ask(record["job"]) if record else _array_job(run_dir)
    frozen = run_dir / SUBMITTED / str((record or {}).get("folder")) / "run.yaml"
    return _run(run_dir, job, frozen)


def last_job(run_dir: Path) -> JobState | None:
    """The job, or the first of a job array, that was last submitted for a folder."""
    record = _record(run_dir)
    return ask(record["job"]) if record else None


def _run(run_dir: Path, job: JobState | None, frozen: Path | None) -> Status:
    status = Status(str(run_dir), job=job)
    config = _config(run_dir, frozen, expected=job is not None)
    status.steps = config.last_step if config else None
    _read_metrics(status, run_dir / METRICS_FILE)
    steps = (int(name.rpartition("-")[2]) for name in checkpoint_names(run_dir))
    status.checkpoint = max(steps, default=None)
    summary = _json(run_dir / "summary.json")
    for name, scores in (summary.get("prompts") or {}).items():
        status.stopped[name] = str((scores.get("stopped") or {}).get("reason") or "finished")
    status.state, status.said = _judge(status, summary)
    if status.state not in ("running", "not finished"):
        status.eta_seconds = None
    return status


def _judge(status: Status, summary: Mapping[str, Any]) -> tuple[str, str]:
    job = status.job
    go_on = "the same command starts it anew"
    if status.checkpoint is not None:
        go_on = f"the same command goes on from step {status.checkpoint}"
    if summary.get("status") == "finished":
        return "finished", f"finished at step {summary.get('steps', status.step)}"
    if job is not None and job.lives:
        why = f" ({job.reason})" if job.reason not in ("", "None") else ""
        if job.state == "RUNNING":
            return "running", f"running on {job.nodes}"
        return "waiting", f"{job.state.lower()}{why}"
    ended = f"; job {job.id} ended: {_how(job)}" if job and job.state != "UNKNOWN" else ""
    if summary.get("status") == "failed":
        return "failed", f"failed: {summary.get('error')}{ended}; {go_on}"
    return "not finished", f"not finished{ended}; unless it is running now, {go_on}"


def _how(job: JobState) -> str:
    return f"{job.state} ({job.reason})" if job.reason not in ("", "None") else job.state


def ask(number: str) -> JobState:
    """What squeue knows of a job, else sacct."""
    shown = _slurm("squeue", "--noheader", f"--jobs={number}", "--format=%T|%r|%N|%L")
    if shown:
        state, reason, nodes, left = (part.strip() for part in shown[0].split("|"))
        return JobState(number, state, reason, nodes, left)
    shown = _slurm(
        *("sacct", "--noheader", "--parsable2", "--allocations"),
        *(f"--jobs={number}", "--format=State,ExitCode,NodeList"),
    )
    if shown:
        state, code, nodes = shown[-1].split("|")
        return JobState(number, state.split(" ")[0], f"exit code {code}", nodes)
    return JobState(number, "UNKNOWN", "Slurm knows no such job any more, or is not here")


def _slurm(*command: str) -> list[str]:
    """Lines that a command of Slurm gives; none where it is not there or refuses."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return []
    return [line for line in done.stdout.splitlines() if line] if done.returncode == 0 else []


def _record(run_dir: Path) -> dict[str, Any] | None:
    """The newest submission, with the name of its folder."""
    records = sorted((run_dir / SUBMITTED).glob(f"*/{RECORD}"), key=lambda p: p.stat().st_mtime)
    if not records:
        return None
    found = _json(records[-1])
    return found | {"folder": records[-1].parent.name} if "job" in found else None


def _array_job(run_dir: Path) -> JobState | None:
    """The task of a job array that was submitted for the folder around this one."""
    around = _record(run_dir.absolute().parent)
    for i, task in enumerate((around or {}).get("tasks", [])):
        if around is not None and Path(task).resolve() == run_dir.resolve():
            return ask(f"{around['job']}_{i}")
    return None


def _config(run_dir: Path, frozen: Path | None, *, expected: bool) -> RunConfig | None:
    """The run file that the run saved, or, before it has begun, the one that was submitted."""
    for path in (run_dir / "run.yaml", frozen):
        if path is not None and path.is_file():
            return load(path)
    if expected:
        return None
    return preflight.check_result(str(run_dir))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_metrics(status: Status, path: Path) -> None:
    times: dict[int, float] = {}
    for line, _ in read_lines(path):
        if line is None:
            continue
        times[line.step] = line.time
        if line.prompt is not None:
            _remember(status.metrics.setdefault(line.prompt, {}), line)
    if not times:
        return
    status.step, status.written = max(times), max(times.values())
    pace = _pace([times[step] for step in sorted(times)[-RECENT:]])
    if pace is not None and status.steps is not None:
        status.eta_seconds = pace * max(0, status.steps - status.step)


def _remember(values: dict[str, tuple[int, float]], line: Line) -> None:
    for name, value in line.metrics.items():
        values[name] = (line.step, value)


def _pace(times: Sequence[float]) -> float | None:
    """Seconds per step, validation included, pauses not."""
    taken = [after - before for before, after in itertools.pairwise(times)]
    if not taken:
        return None
    most = PAUSE * statistics.median(taken)
    return statistics.fmean([seconds for seconds in taken if seconds <= most] or taken)


def as_json(status: Status) -> str:
    """One JSON object; numbers that JSON does not have are null."""
    return json.dumps(_plain(asdict(status)), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(status: Status, now: float | None = None) -> str:
    """A few lines for a person."""
    now = time.time() if now is None else now
    lines = [f"{status.run_dir}: {status.said}"]
    if status.tasks:
        return "\n".join([*lines, *(_line(task, now) for task in status.tasks)])
    job = status.job
    left = f", {job.time_left} left of its time limit" if job and job.state == "RUNNING" else ""
    lines.append(f"job:      {job.id} {_how(job)}{left}" if job else "job:      no job")
    lines.append(f"step:     {_progress(status)}")
    if status.written is not None:
        lines.append(f"written:  {duration(now - status.written)} ago")
    if status.checkpoint is not None:
        lines.append(f"saved:    step {status.checkpoint}")
    for name, values in status.metrics.items():
        said = "  ".join(f"{key} {value:.4f}" for key, value in shown_metrics(values).items())
        ended = status.stopped.get(name, "finished")
        why = f"  ({ended.replace('_', ' ')})" if ended != "finished" else ""
        lines.append(f"{name}: {said}{why}")
    return "\n".join(lines)


def shown_metrics(values: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Of all metrics of a prompt: those that a person asks for first."""
    wanted = [n for n in values if n == "train_loss" or n.startswith("validation_")]
    return {name: values[name][1] for name in wanted}


def _line(status: Status, now: float) -> str:
    ago = "" if status.written is None else f", written {duration(now - status.written)} ago"
    return f"  {Path(status.run_dir).name}: {status.said}; step {_progress(status)}{ago}"


def _progress(status: Status) -> str:
    eta = "" if status.eta_seconds is None else f", about {duration(status.eta_seconds)} to go"
    return f"{status.step} of {'?' if status.steps is None else status.steps}{eta}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min`` or ``2 d 4 h``."""
    seconds = max(0, round(seconds))
    if seconds < 90:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
