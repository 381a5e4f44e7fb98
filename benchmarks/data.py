"""Memory and speed from files to rows: preflight, loading, splitting, the leak check.

    python benchmarks/data.py --rows 500000 5000000

For each length, writes a synthetic jsonl file of about 100 bytes per row and reads it in a separate
process, by columns and row by row. Printed times are CPU times; the JSON also has wall times.
Memory is the process's anonymous memory (RssAnon) above that after its imports: mapped pages belong
to the page cache, which the kernel can reclaim.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "data.json"
#: Reading row by row is slower and uses one in this many rows.
SLOW_SHARE = 10


class Peak(threading.Thread):
    """Measures the peak of this process's anonymous memory since its creation, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = _anonymous()
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, _anonymous())
            time.sleep(0.02)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def write(path: Path, rows: int) -> None:
    text = "the quick brown fox jumps over a lazy dog while nobody is looking at it"
    words = text.split()
    with path.open("w") as file:
        for i in range(rows):
            some = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(12))
            file.write(json.dumps({"id": i, "text": f"{i}: {some}", "label": words[i % 3]}) + "\n")


def measure(path: str, column_wise: bool) -> dict[str, Any]:
    """Measure seconds and memory of each phase, in a separate process."""
    import pyarrow.compute
    import pyarrow.json
    import pyarrow.parquet  # noqa: F401  so that memory is counted from after the imports

    from trainer.config import RunConfig
    from trainer.data import arrow_reader, ingest, splits

    if not column_wise:

        def odd(*_: Any) -> Any:
            raise arrow_reader.NeedsRowwiseCheck

        ingest.read_columns = odd
    config = RunConfig.model_validate(
        {
            "output_dir": "out",
            "base": {"model": "m"},
            "tasks": [
                {
                    "name": "t",
                    "train": path,
                    "shifted_validation": f"{path}.held.jsonl",
                    "input": "{text}",
                    "target": "{label}",
                }
            ],
            "prompts": [{"name": "p", "task": "t"}],
            "training": {"steps": 1},
        }
    )
    task = config.tasks[0]
    figures: dict[str, Any] = {}
    peak = Peak()

    def phase(name: str, work: Callable[[], Any]) -> Any:
        started, cpu = time.perf_counter(), time.process_time()
        result = work()
        figures[name] = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": peak.most - peak.before,
        }
        return result

    phase("preflight", lambda: splits.check_rows(config))
    read = phase("load", lambda: splits.load_splits(task))
    leaks = phase("leaks", lambda: splits.leaks(task, read))
    phase("read once", lambda: sum(1 for _ in read["train"]))
    figures["leaked"] = [leak.count for leak in leaks]
    figures["rows"] = {name: len(split) for name, split in read.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 5_000_000])
    parser.add_argument("--alone", nargs=2, metavar=("FILE", "HOW"), help="used by the benchmark")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.alone[0], args.alone[1] == "columns")))
        return
    results = []
    for count in args.rows:
        for how, rows in (("columns", count), ("rows", count // SLOW_SHARE)):
            with tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
                path = Path(folder) / "rows.jsonl"
                write(path, rows)
                with path.open() as file, Path(f"{path}.held.jsonl").open("w") as held:
                    held.writelines(line for _, line in zip(range(1000), file, strict=False))
                size = path.stat().st_size
                command = [sys.executable, __file__, "--alone", str(path), how]
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(done.stderr)
            result = {"count": rows, "bytes": size, "how": how, **json.loads(done.stdout)}
            results.append(result)
            print(_line(result), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _line(result: dict[str, Any]) -> str:
    phases = ("preflight", "load", "leaks", "read once")
    times = ", ".join(f"{name} {result[name]['cpu_seconds']:.1f} s" for name in phases)
    peak = max(result[name]["peak_bytes"] for name in phases) / 1e6
    return (
        f"{result['count']:>9,} rows, {result['bytes'] / 1e6:,.0f} MB, by {result['how']}: "
        f"{times}; {peak:.0f} MB above import at most"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
