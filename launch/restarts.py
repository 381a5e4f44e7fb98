"""Restart a run from its last checkpoint after a failure: ``train --max-restarts N``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launch import messages
from launch.exit_report import ExitReport
from trainer.checkpointing.checkpoint_names import CHECKPOINTS, checkpoint_names
from trainer.runtime.errors import EXIT_FAILURE
from trainer.runtime.json_file import parse_json

TAIL_BYTES = 1 << 16  # the end of metrics.jsonl that is read


def run(
    attempt: Callable[[bool], ExitReport], output: Path, limit: int, *, fresh: bool
) -> ExitReport:
    """Run until success, bad input or a stop signal, with at most ``limit`` restarts.

    A run that fails twice at the same step without a new checkpoint is not restarted again.

    Args:
        attempt: starts the run; its argument is true if an earlier run in ``output`` is archived.
    """
    started_at = time.time()
    previous: tuple[str, int] | None = None
    for left in range(limit, -1, -1):
        report = attempt(fresh)
        if report.code != EXIT_FAILURE or limit == 0:
            return report
        progress = newest, step = _newest_checkpoint(output), _last_step(output)
        if left == 0:
            return _not_restarted(
                report, f"still failing after {limit} restarts (--max-restarts={limit})"
            )
        if progress == previous:
            return _not_restarted(
                report, f"failed twice at step {step} without progress: not restarted"
            )
        previous = progress
        # A run that failed before it had archived the earlier one must still do so.
        fresh = fresh and not _is_newer(output, newest, started_at)
        if report.message:
            messages.failure(report.message)
        continues = f"resumes from {newest}" if newest and not fresh else "starts over"
        messages.note(
            f"failed at step {step}; restart {limit - left + 1} of {limit}: the run {continues}"
        )
    raise AssertionError("the last attempt returns")


def _not_restarted(report: ExitReport, why: str) -> ExitReport:
    return ExitReport(report.code, f"{report.message}; {why}" if report.message else why)


def _newest_checkpoint(output: Path) -> str:
    """Name of the newest checkpoint; empty if there is none."""
    return max(checkpoint_names(output), default="")


def _is_newer(output: Path, checkpoint: str, started_at: float) -> bool:
    return bool(checkpoint) and (output / CHECKPOINTS / checkpoint).stat().st_mtime >= started_at


def _last_step(output: Path) -> int:
    """The last logged step; 0 if there is none."""
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
