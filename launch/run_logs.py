"""Find the log of the rank that failed first, and its last lines."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from launch.exit_report import REFUSED, VERDICT
from trainer.distributed.watchdog import read_lost
from trainer.runtime import stop_signals

#: Number of last lines that a status shows, and of bytes that are read for them.
LINES, TAIL_BYTES = 15, 1 << 16
#: A traceback that begins before this many last lines is of an earlier start of the run.
RECENT_LINES = 100
#: Logs of one start: seconds between the last changes of two of them.
SAME_START = 60.0
LAUNCHER_LOGS = ("launcher.log", "launcher-host*.log")
_TRACEBACK = "Traceback (most recent call last)"
_RANK = re.compile(r"^rank (\d+) ")


@dataclass(frozen=True)
class LogTail:
    """The last lines of a log, and the error in its last traceback.

    Attributes:
        error: last line of the traceback; empty without a traceback.
    """

    path: str
    lines: list[str] = field(default_factory=list)
    error: str = ""


def launcher_logs(run_dir: Path) -> list[Path]:
    """Return the logs of the launchers of a run, one per host."""
    return [path for pattern in LAUNCHER_LOGS for path in (run_dir / "logs").glob(pattern)]


def launcher_verdict(run_dir: Path) -> str:
    """Return how the processes ended, from the launchers' logs; empty if unknown.

    On several hosts, it is that of the launcher whose log changed first.
    """
    changed = _by_change(launcher_logs(run_dir))
    for path in sorted(changed, key=lambda path: changed[path]):
        last = next(reversed(_tail(path).lines), "")
        if last.startswith(VERDICT):
            return last.removeprefix(VERDICT).partition("; see the logs")[0]
    return ""


def failure_log(run_dir: Path) -> LogTail | None:
    """Return the log that explains a failure; None if there is no log.

    It is the log of the first rank that ended with a traceback, else the launcher's.
    """
    logs = run_dir / "logs"
    changed = _by_change([*logs.glob("rank-*.log")])
    newest = max(changed.values(), default=0.0)
    named = rank_log(logs, launcher_verdict(run_dir))
    for path in sorted(changed, key=lambda path: (path != named, changed[path])):
        tail = _tail(path)
        if tail.error and newest - changed[path] < SAME_START:
            return tail
    changed = _by_change(launcher_logs(run_dir)) or changed
    last = max(changed, key=lambda path: changed[path], default=None)
    return None if last is None else _tail(last)


def rank_log(logs: Path, name: str) -> Path | None:
    """Return the log of a rank, such as "rank 1 (process 7 on a)"; None for other processes."""
    rank = _RANK.match(name)
    return logs / f"rank-{rank[1]}.log" if rank else None


def last_error(log: Path, start: int) -> str:
    """Return the error in the last traceback of a log from byte ``start``; empty without one."""
    return _tail(log, start).error


def failed_without_summary(run_dir: Path) -> str:
    """Return the error of a run that ended before it could write a summary; empty if none.

    A run that was stopped by a signal is not a failure: a rank records the signal in a file.
    """
    if lost := read_lost(run_dir / "logs"):
        return lost
    tail = failure_log(run_dir)
    if tail is None or not tail.error:
        return ""
    changed = _by_change([Path(tail.path)]).get(Path(tail.path), 0.0)
    stopped = stop_signals.stopped_since(run_dir / "logs", changed - SAME_START)
    return "" if stopped else tail.error


def refusal(run_dir: Path) -> str:
    """Return why the ranks of the last start refused the input; empty if they did not."""
    if launcher_verdict(run_dir) != REFUSED:
        return ""
    lines = _tail(run_dir / "logs" / "rank-0.log").lines
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else REFUSED


def _tail(path: Path, start: int = 0) -> LogTail:
    try:
        with path.open("rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return LogTail(str(path))
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    error = ""
    if any(_TRACEBACK in line for line in lines[-RECENT_LINES:]):
        error = next((line for line in reversed(lines) if not line[0].isspace()), "")
    return LogTail(str(path), lines[-LINES:], error)


def _by_change(paths: list[Path]) -> dict[Path, float]:
    """Return the time of the last change of every log that is not empty."""
    changed = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        if status.st_size:
            changed[path] = status.st_mtime
    return changed
