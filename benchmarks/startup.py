"""Time of ``promptshard --help``, and until the first step of ``promptshard train``.

    python -m benchmarks.startup

Writes benchmarks/results/startup.{md,json}. CPU seconds, of the command and its processes, depend
less on other programs than seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RANKS = (1, 2)
#: Calls of ``--help``; the fastest counts.
HELPS = 5
SETTINGS = [
    *("examples/quickstart.yaml", "training.steps=1", "evaluation.train_rows=0"),
    *(f"tasks[{i}].hand_written=[]" for i in (0, 1)),
    *(f"tasks[{i}].max_validation_rows=4" for i in (0, 1)),
    *(f"prompts[{i}].init=random" for i in (0, 1)),
]
#: What rank 0 prints when the first step runs.
FIRST = "step 1/1"


def measure(ranks: int, output: Path) -> dict[str, float]:
    """Run the command until its first step; return seconds and CPU seconds."""
    words = [f"output_dir={output}", "--processes", str(ranks)]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "train", *SETTINGS, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{output}.db"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if FIRST in line:
            break
    else:
        raise SystemExit("".join(read))
    seconds, used = time.monotonic() - started, _cpu_seconds(process.pid)
    process.stdout.read()
    process.wait()
    time_of = json.loads((output / "summary.json").read_text())["time"]
    return {"seconds": seconds, "cpu_seconds": used, "load": os.getloadavg()[0], **time_of}


def measure_help() -> dict[str, float]:
    """Print the help of a command; return seconds and CPU seconds."""
    calls = []
    for _ in range(HELPS):
        started, before = time.monotonic(), os.times()
        command = [sys.executable, "-m", "launch", "validate", "--help"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        used = after.children_user + after.children_system
        used -= before.children_user + before.children_system
        calls.append((used, time.monotonic() - started))
    used, seconds = min(calls)
    return {"seconds": seconds, "cpu_seconds": used}


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of all that it has started, ended ones included."""
    total = 0.0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def table(result: dict[str, Any]) -> str:
    lines = [
        "# From the command to the first step",
        "",
        f"`python -m benchmarks.startup` on {result['machine']}: `promptshard train` on the tiny "
        "base, random prompts, no instructions. The load average counts other programs.",
        "",
        "| ranks | seconds | CPU seconds | seconds until the ranks are connected | load average |",
        "|---|---|---|---|---|",
    ]
    for ranks, run in result["runs"].items():
        lines.append(
            f"| {ranks} | {run['seconds']:.1f} | {run['cpu_seconds']:.1f} | {run['start']:.1f} | "
            f"{run['load']:.1f} |"
        )
    shown = result["help"]
    lines += [
        "",
        f"`promptshard validate --help`: {shown['seconds']:.2f} s, "
        f"{shown['cpu_seconds']:.2f} CPU seconds.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        runs = {str(ranks): measure(ranks, Path(temporary) / str(ranks)) for ranks in RANKS}
    result = {"machine": machine(), "runs": runs, "help": measure_help()}
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (RESULTS / "startup.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
