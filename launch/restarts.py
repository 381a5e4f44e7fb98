"""Start a run again after a failure, from its last checkpoint: ``train --max-restarts N``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launch import messages
from launch.endings import ExitReport
from trainer.checkpointing.checkpoint_names import CHECKPOINTS, checkpoint_names
from trainer.runtime.errors import EXIT_FAILURE
from trainer.runtime.json_file import parse_json

TAIL_BYTES = 1 << 16  # of the log of numbers: its last lines


def run(
    attempt: Callable[[bool], ExitReport], output: Path, limit: int, *, fresh: bool
) -> ExitReport:
    """Attempt a run until it ends well, has bad input or was stopped: ``limit`` times more at most.

    A run that fails twice at the same step, with no checkpoint in between, would do so again.

    Args:
        attempt: called with whether an earlier run in ``output`` is moved out of the way.
    """
    began = time.time()
    before: tuple[str, int] | None = None
    for left in range(limit, -1, -1):
        ending = attempt(fresh)
        if ending.code != EXIT_FAILURE or limit == 0:
            return ending
        came_to = newest, step = _newest_checkpoint(output), _last_step(output)
        if left == 0:
            return _given_up(
                ending, f"still failing after {limit} restarts (--max-restarts={limit})"
            )
        if came_to == before:
            return _given_up(ending, f"failed twice at step {step} without progress: not restarted")
        before = came_to
        # One that failed before it had put the earlier run aside must still do so.
        fresh = fresh and not _is_of_now(output, newest, began)
        if ending.message:
            messages.failure(ending.message)
        goes_on = f"resumes from {newest}" if newest and not fresh else "starts over"
        messages.note(
            f"failed at step {step}; restart {limit - left + 1} of {limit}: the run {goes_on}"
        )
    raise AssertionError("the last attempt returns")


def _given_up(ending: ExitReport, why: str) -> ExitReport:
    return ExitReport(ending.code, f"{ending.message}; {why}" if ending.message else why)


def _newest_checkpoint(output: Path) -> str:
    """Its name; empty if there is none."""
    return max(checkpoint_names(output), default="")


def _is_of_now(output: Path, checkpoint: str, began: float) -> bool:
    return bool(checkpoint) and (output / CHECKPOINTS / checkpoint).stat().st_mtime >= began


def _last_step(output: Path) -> int:
    """The step that was logged last; 0 if none was."""
    try:
        with (output / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(parse_json(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut short by the failure
            continue
    return 0
