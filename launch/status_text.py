"""Render the status of runs as text or JSON."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.cells import cell_len, set_cell_size

from launch.run_state import PromptStatus, Status
from launch.status import best_prompts, ranked_prompts
from trainer.evaluation.score_format import column_title, format_score, shown_scores
from trainer.runtime.json_file import to_json
from trainer.runtime.redact import printable, redact

#: A process that did not touch its lock for longer is suspended, or its file system is slow.
LATE_SECONDS = 60.0
#: Width of a table without a terminal: wide enough for every name.
PLAIN_WIDTH = 400
#: Maximum number of characters of a line of a log.
LOG_WIDTH = 240
#: Names in a table are not shortened below this number of characters.
MIN_NAME_WIDTH = 16
STOPPED = {
    "early_stopping": "stopped early",
    "halving": "eliminated",
    "diverged": "diverged",
    "finished": "",
}


def as_json(status: Status, *, indent: int | None = 2) -> str:
    """Render a status as a JSON object; numbers that are not finite become null."""
    return to_json(_as_dict(status), indent=indent)


def list_json(runs: Sequence[Status]) -> str:
    """Render several statuses as a JSON list of objects with the keys of ``as_json``."""
    return to_json([_as_dict(status) for status in runs], indent=2)


def _as_dict(status: Status) -> dict[str, Any]:
    """Return the fields of a status; the key ``said`` is an older name of ``description``."""
    tasks = [_as_dict(task) for task in status.tasks]
    plain: dict[str, Any] = _redacted(asdict(replace(status, tasks=[])))
    best = [
        {
            "task": prompt.task,
            "prompt": prompt.name,
            "metric": prompt.metric,
            "score": prompt.best.get(f"validation_{prompt.metric}"),
            "step": prompt.best_step,
        }
        for prompt in best_prompts(status)
    ]
    return plain | {"said": plain["description"], "tasks": tasks, "best": _redacted(best)}


def _redacted(value: Any) -> Any:
    """Remove credentials from all texts of a JSON value."""
    if isinstance(value, dict):
        return {key: _redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def as_text(
    status: Status, now: float | None = None, width: int = PLAIN_WIDTH, height: int | None = None
) -> str:
    """Render a status as text, without terminal control characters.

    Args:
        now: Unix seconds.
        width: maximum number of characters in a line of a table.
        height: maximum number of lines; the prompts that rank last are left out.
    """
    now = time.time() if now is None else now
    lines = [f"{status.run_dir}: {status.description}", *_details(status, now)]
    text = printable(redact("\n".join(lines)))
    if status.log is not None and status.log.lines:
        # indented, so that these lines differ from the output of this command
        text += _safe(f"\n\nlast lines of {status.log.path}:")
        text += "".join(f"\n  {_safe(line)[:LOG_WIDTH]}" for line in status.log.lines)
    prompts = ranked_prompts(status)
    if prompts:
        room = len(prompts)
        if height is not None:
            used = sum(1 + max(0, cell_len(line) - 1) // width for line in text.splitlines())
            room = max(1, height - used - 4)
        text += "\n\n" + _prompt_table(prompts[:room], width)
        if room < len(prompts):
            text += f"\n... and {len(prompts) - room} more prompts with lower scores"
    if status.tasks:
        text += "\n\n" + _run_table(status.tasks, now, width)
    return text


def _details(status: Status, now: float) -> list[str]:
    """Return the lines of a run without its prompts, each ``NAME: VALUE``."""
    if status.tasks:
        return []
    job, process, lines = status.job, status.process, []
    if process is not None and process.dead is None:
        late = process.heartbeat_seconds or 0.0
        if late > LATE_SECONDS:
            lines.append(
                f"heartbeat: none for {duration(late)}; the process is suspended or its file "
                f"system hangs (look at it with: ps -fp {process.pid} on {process.host})"
            )
    if job is not None:
        left = f", {job.time_left} left of its time limit" if job.state == "RUNNING" else ""
        lines.append(f"Slurm job: {job.id} {job}{left}")
    lines.append(f"step: {_progress(status)}")
    if status.tokens_per_second is not None:
        lines.append(f"speed: {status.tokens_per_second:,.0f} useful tokens/s")
    if status.written is not None:
        lines.append(f"last metrics: {duration(now - status.written)} ago")
    if status.checkpoint is not None:
        lines.append(f"checkpoint: step {status.checkpoint}")
    if status.resume:
        verb = "start over" if status.checkpoint is None else "resume"
        hints = [] if _is_here(status.resume) else ["in the folder in which it was started"]
        hints += ["on every host, with its --node-rank"] if "--no-ssh" in status.resume else []
        where = f"   ({'; '.join(hints)})" if hints else ""
        lines.append(f"{verb}: {status.resume}{where}")
    if status.state == "dead" and process is not None and "heartbeat" in (process.dead or ""):
        lines.append(
            f"first make sure that process {process.pid} on {process.host} has ended: the host may "
            "only be disconnected"
        )
    return lines


def _is_here(command: str) -> bool:
    """Whether the run file of a command exists, seen from the working directory."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its end
        return True
    return len(words) < 3 or os.path.exists(words[2])


def _prompt_table(prompts: Sequence[PromptStatus], width: int) -> str:
    several = len({prompt.task for prompt in prompts}) > 1
    titles = ["prompt", *(["task"] if several else []), "step", "train loss", "best score", ""]
    rows = [
        [
            prompt.name,
            *([prompt.task] if several else []),
            f"{prompt.step}/{prompt.steps}",
            "–" if prompt.train_loss is None else f"{prompt.train_loss:.4f}",
            best_score(prompt),
            STOPPED.get(prompt.stopped or "", prompt.stopped or ""),
        ]
        for prompt in prompts
    ]
    return table(titles, rows, width)


def best_score(prompt: PromptStatus) -> str:
    """Format the best validation score of a prompt: ``accuracy 98.5% at step 20``, or a dash."""
    key = f"validation_{prompt.metric}"
    shown = shown_scores({key: prompt.best.get(key, math.nan)}, prompt.teacher is not None)
    ((key, value),) = shown.items()
    if prompt.best_step is None or math.isnan(value):
        return "–"
    return f"{column_title(key)} {format_score(key, value)} at step {prompt.best_step}"


def as_list(runs: Sequence[Status], now: float | None = None, width: int = PLAIN_WIDTH) -> str:
    """Render one line per run, in the given order."""
    return _run_table(runs, time.time() if now is None else now, width)


def _run_table(runs: Sequence[Status], now: float, width: int) -> str:
    rows = []
    for run in runs:
        best = best_prompts(run)
        score = f"{best_score(best[0])} ({best[0].name})" if best else "–"
        if len(best) > 1:
            score += f", {len(best) - 1} more"
        if run.state in ("failed", "unknown", "dead", "waiting"):
            score = run.error or run.description.removeprefix(f"{run.state}: ")
        rows.append(
            [
                run.run_dir,
                run.state,
                f"{run.step}/{'?' if run.steps is None else run.steps}",
                "–" if run.written is None else f"{duration(now - run.written)} ago",
                str(len(run.prompts) or "–"),
                score,
            ]
        )
    titles = ["run", "state", "step", "last written", "prompts", "best score, or why it stopped"]
    return table(titles, rows, width)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Render rows as aligned columns of at most ``width`` characters, one line per row.

    If they do not fit, the names in the first column are shortened in the middle, then the text in
    the last column at its end.
    """
    lines = [list(titles), *([_safe(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    for column, least in ((0, MIN_NAME_WIDTH), (-1, 0)):
        cut = min(max(0, excess), max(0, widths[column] - least))
        widths[column] -= cut
        excess -= cut
    for line in lines:
        line[0] = _shorten(line[0], widths[0], end=widths[0] // 2)
        line[-1] = _shorten(line[-1], widths[-1])
    padded = ([set_cell_size(*cell) for cell in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _shorten(text: str, width: int, end: int = 0) -> str:
    """Cut text to ``width`` characters; keep ``end`` characters after the ellipsis."""
    if cell_len(text) <= width or width < 1:
        return text if width else ""
    return f"{set_cell_size(text, width - end - 1)}…{text[len(text) - end :]}"


def _safe(text: str) -> str:
    return printable(redact(text)).replace("\t", " ")


def _progress(status: Status) -> str:
    share = f" ({100 * status.step // status.steps}%)" if status.steps else ""
    eta = "" if status.eta_seconds is None else f", about {duration(status.eta_seconds)} left"
    return f"{status.step} of {'?' if status.steps is None else status.steps}{share}{eta}"


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
