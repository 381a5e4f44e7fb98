"""Check a GPU: tests, speed of products and attention, an out-of-memory error, training runs.

    make gpu-check
    python -m benchmarks.gpu_check [--minutes 10] [--only PART ...] [--out FOLDER]
    python -m benchmarks.gpu_check --small --out FOLDER     # small sizes, without a GPU

Uses the first GPU. A part that fails or takes too long does not end the check. Writes
gpu-check-CARD.json and gpu-check-CARD.md after each part, to benchmarks/results/ by default. The
exit code is 0 if all parts passed, otherwise 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.part import PARTS
from benchmarks.gpu_check.runner import ROOT, Start, run_parts, start_process

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None, start: Start = start_process) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--minutes", type=float, default=10, help="for all parts (default: 10)")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="PART", help=f"some of {', '.join(names)}"
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--small", action="store_true", help="small sizes, without a GPU")
    given = parser.parse_args(arguments)
    if given.minutes <= 0:
        parser.error(f"--minutes {given.minutes}: must be positive")
    if given.small and given.out is None:
        parser.error("--small needs --out FOLDER: its numbers are not those of a GPU")
    if not given.small and (problem := missing_gpu()):
        parser.error(problem)
    chosen = selected(given.only or names)
    return check(given.out or RESULTS, chosen, given.small, 60 * given.minutes, start)


def selected(names: Sequence[str]) -> list[str]:
    """Return the names with the parts that they need, and the one that names the card."""
    needed = {part.needs for part in PARTS if part.name in names}
    return ["card", *(part.name for part in PARTS[1:] if part.name in {*names, *needed})]


def missing_gpu() -> str | None:
    """Return the reason for having no GPU to check; None if there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    build = f"torch {torch.__version__}"
    return f"{build} finds no GPU (see nvidia-smi); --small runs small sizes without one"


def check(out: Path, names: Sequence[str], small: bool, seconds: float, start: Start) -> int:
    """Run the parts and write the report after each of them; return the exit code."""
    from benchmarks.gpu_check.report import page, summarize
    from benchmarks.gpu_check.sizes import FULL, SMALL

    shape = (SMALL if small else FULL).shape
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    records = []
    with tempfile.TemporaryDirectory(prefix="promptshard-gpu-check-") as folder:
        for record in run_parts(Path(folder), names, small=small, seconds=seconds, start=start):
            records.append(record)
            outcome = f"{record['name']}: {record['status']}, {record['seconds']:.0f} s"
            print(f"{outcome}. {record['reason'] or ''}", file=sys.stderr, flush=True)
            report = summarize(records, shape, time.monotonic() - started)
            name = "gpu-check-" + re.sub(r"[^A-Za-z0-9]+", "-", report["card"]).strip("-")
            (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
            (out / f"{name}.md").write_text(page(report))
    print(page(report))
    print(f"written to {out / name}.json and .md", file=sys.stderr)
    return int(any(record["status"] != "passed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
