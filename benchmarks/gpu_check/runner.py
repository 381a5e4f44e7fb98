"""Run the parts one after the other, each in a process with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.part import PARTS, Part

ROOT = Path(__file__).resolve().parents[2]
#: Seconds below which a part is not started.
LEAST_SECONDS = 15
#: Factor of the time limits without a GPU, where a busy CPU also imports more slowly.
SMALL_FACTOR = 5
#: Lines of a failed part's output in the report.
LOG_LINES = 20
#: Starts a module with arguments, and its log; returns its exit code, or None after the limit.
Start = Callable[[str, Sequence[str], Path, float], int | None]


def start_process(module: str, arguments: Sequence[str], log: Path, limit: float) -> int | None:
    """Run a module in a new process; kill it and its children after ``limit`` seconds."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also what a crashed part has left running
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_parts(
    folder: Path,
    names: Sequence[str],
    *,
    small: bool,
    seconds: float,
    start: Start = start_process,
) -> Iterator[dict[str, Any]]:
    """Yield each part's record: name, about, status, seconds, reason, result, log.

    Args:
        seconds: time for all parts; those that it leaves no time for are skipped.
    """
    end = time.monotonic() + seconds
    passed = set()
    for part in (part for part in PARTS if part.name in names):
        left = end - time.monotonic()
        if part.needs is not None and part.needs not in passed:
            record = _record(part, "skipped", 0, f"it needs the part {part.needs}")
        elif left < LEAST_SECONDS:
            record = _record(part, "skipped", 0, f"no time left of {seconds:.0f} s")
        else:
            print(f"{part.name}: {part.about} ...", file=sys.stderr, flush=True)
            limit = part.seconds * (SMALL_FACTOR if small else 1)
            record = run_part(part, folder, small, min(limit, left), start)
        if record["status"] == "passed":
            passed.add(part.name)
        yield record


def run_part(part: Part, folder: Path, small: bool, limit: float, start: Start) -> dict[str, Any]:
    log = folder / f"{part.name}.log"
    arguments = [part.name, str(folder), *(["--small"] if small else [])]
    started = time.monotonic()
    code = start("benchmarks.gpu_check.part", arguments, log, limit)
    seconds = time.monotonic() - started
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    lines = [line.rstrip() for line in lines if line.strip()]
    if code == 0:
        record = _record(part, "passed", seconds, None)
    elif code is None:
        record = _record(part, "timed out", seconds, f"ended after {limit:.0f} s")
    elif code < 0:
        record = _record(part, "failed", seconds, f"killed by {signal.Signals(-code).name}")
    else:
        record = _record(part, "failed", seconds, lines[-1] if lines else f"exit code {code}")
    with suppress(OSError, ValueError):  # a part that failed early has no result
        record["result"] = json.loads((folder / f"{part.name}.json").read_text())
    if code != 0:
        record["log"] = lines[-LOG_LINES:]
    return record


def _record(part: Part, status: str, seconds: float, reason: str | None) -> dict[str, Any]:
    return {
        "name": part.name,
        "about": part.about,
        "status": status,
        "seconds": round(seconds, 1),
        "reason": reason,
        "result": None,
        "log": [],
    }
