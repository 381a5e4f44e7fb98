"""Restart a run from its last checkpoint after a failure: ``train --max-restarts N``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch import messages
from launch.exit_report import ExitReport
from trainer.checkpointing.checkpoint_names import CHECKPOINTS, checkpoint_names, newest_checkpoint
from trainer.runtime.errors import EXIT_FAILURE
from trainer.tracking.metrics_log import METRICS_FILE, read_lines


def run(
    attempt: Callable[[bool], ExitReport], output: Path, limit: int, *, fresh: bool
) -> ExitReport:
    """Run until success, bad input or a stop signal, with at most ``limit`` restarts.

    A run that fails twice at the same step without a new checkpoint is not restarted again.

    Args:
        attempt: starts the run; its argument: archive an earlier run in ``output`` first.
    """
    earlier = _checkpoints(output)
    previous: tuple[str | None, int] | None = None
    for left in range(limit, -1, -1):
        report = attempt(fresh)
        if report.code != EXIT_FAILURE or limit == 0:
            return report
        progress = newest, step = newest_checkpoint(output), _last_step(output)
        if left == 0:
            why = f"still failing after {limit} restarts (--max-restarts={limit})"
        else:
            why = f"failed twice at step {step} without progress: not restarted"
        if left == 0 or progress == previous:
            message = f"{report.message}; {why}" if report.message else why
            return ExitReport(report.code, message)
        previous = progress
        # If the failed run has not yet archived the earlier run, the next attempt must do so.
        fresh = fresh and _checkpoints(output) == earlier
        if report.message:
            messages.failure(report.message)
        continues = f"resumes from {newest}" if newest and not fresh else "starts over"
        messages.note(
            f"failed at step {step}; restart {limit - left + 1} of {limit}: the run {continues}"
        )
    raise AssertionError("the last attempt returns")


def _checkpoints(output: Path) -> dict[str, int]:
    """Return the time of each checkpoint, by the clock of the file system."""
    names = checkpoint_names(output)
    return {name: (output / CHECKPOINTS / name).stat().st_mtime_ns for name in names}


def _last_step(output: Path) -> int:
    step = 0
    with suppress(OSError):
        for line, _ in read_lines(output / METRICS_FILE):
            step = line.step if line else step
    return step
