"""Render a run's status as text or JSON."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch.status import Status, describe_job
from trainer.runtime.redact import printable, redact


def as_json(status: Status) -> str:
    """Render a status as a JSON object; numbers that are not finite become null."""
    return json.dumps(_as_dict(status), indent=2)


def _as_dict(status: Status) -> dict[str, Any]:
    """Return the fields of a status; the key ``said`` is an older name of ``description``."""
    tasks = [_as_dict(task) for task in status.tasks]
    plain: dict[str, Any] = _plain(asdict(replace(status, tasks=[])))
    return plain | {"said": status.description, "tasks": tasks}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(status: Status, now: float | None = None) -> str:
    """Render a status as a few lines of text, without terminal control characters."""
    return printable(redact(_text(status, now)))


def _text(status: Status, now: float | None) -> str:
    now = time.time() if now is None else now
    lines = [f"{status.run_dir}: {status.description}"]
    if status.tasks:
        return "\n".join([*lines, *(_line(task, now) for task in status.tasks)])
    job = status.job
    left = f", {job.time_left} left of its time limit" if job and job.state == "RUNNING" else ""
    lines.append(f"Slurm job: {job.id} {describe_job(job)}{left}" if job else "Slurm job: none")
    lines.append(f"step: {_progress(status)}")
    if status.written is not None:
        lines.append(f"last metrics: {duration(now - status.written)} ago")
    if status.checkpoint is not None:
        lines.append(f"checkpoint: step {status.checkpoint}")
    for name, values in status.metrics.items():
        shown = "  ".join(
            f"{key} {value:.4f}"
            for key, (_, value) in values.items()
            if key == "train_loss" or key.startswith("validation_")
        )
        ended = status.stopped.get(name, "finished")
        why = f"  ({ended.replace('_', ' ')})" if ended != "finished" else ""
        lines.append(f"{name}: {shown}{why}")
    return "\n".join(lines)


def _line(status: Status, now: float) -> str:
    ago = "" if status.written is None else f", last metrics {duration(now - status.written)} ago"
    return f"  {Path(status.run_dir).name}: {status.description}; step {_progress(status)}{ago}"


def _progress(status: Status) -> str:
    eta = "" if status.eta_seconds is None else f", about {duration(status.eta_seconds)} left"
    return f"{status.step} of {'?' if status.steps is None else status.steps}{eta}"


def duration(seconds: float) -> str:
    """Format a duration: ``45 s``, ``12 min``, ``3 h 20 min`` or ``2 d 4 h``."""
    if not math.isfinite(seconds):
        return "unknown time"
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
