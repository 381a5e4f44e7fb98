"""Scores with few training rows: this trainer's defaults compared with PEFT at its best rate.

    pip install -c constraints.txt -e '.[test,benchmark]'
    python -m benchmarks.learning [--only ours|peers] [--workers 2]
    python -m benchmarks.learning --steps 6    # half the rows; separate result files
    python -m benchmarks.learning --quick      # one task, few steps and rates; writes nothing

All arms train the example tasks on the tiny base model in fp32, with the same rows in the same
order. This trainer runs one bank whose run file sets only task and method; a second bank also has
the hand-written instructions of the examples, like PEFT's arms with an initial text. PEFT trains at
five learning rates and is reported at the one with the best validation score. Writes a table, a
plot and JSON to benchmarks/results/; results of arms that are not selected are kept. Scores depend
only on the seeds, not on the machine's load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning import ours
from benchmarks.learning.report import RESULTS, best_rate, plot, summary, table
from launch.launcher_command import free_port

ROOT = Path(__file__).resolve().parents[2]
BUDGET: dict[str, Any] = {
    "tasks": ["triage", "animals", "codegen"],
    "steps": 12,
    "tokens_per_step": 512,
    "every": 4,
    "validation_rows": 500,
}
SEEDS = (0, 1, 2, 3, 4)
#: Five learning rates of each PEFT arm; the range is moved if the best one is at its edge.
RATES: dict[str, tuple[float, ...]] = {
    "prompt tuning, vocab": (0.003, 0.01, 0.03, 0.1, 0.3),
    "prompt tuning, text": (0.001, 0.003, 0.01, 0.03, 0.1),
    "p-tuning": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "LoRA": (0.0003, 0.001, 0.003, 0.01, 0.03),
}
#: Maximum number of times that a range of rates is moved by one.
MOVES = 3

Run = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=("ours", "peers"), help="measure one side only; keep the other result"
    )
    parser.add_argument("--steps", type=int, default=BUDGET["steps"], help="of every training")
    parser.add_argument("--workers", type=int, default=2, help="processes that train peers")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing")
    arguments = parser.parse_args(given)
    steps = arguments.steps
    budget, seeds, rates = BUDGET | {"steps": steps, "every": max(1, steps // 3)}, SEEDS, RATES
    name = "learning" if steps == BUDGET["steps"] else f"learning-{steps}-steps"
    if arguments.quick:
        budget = BUDGET | {"tasks": ["triage"], "steps": 2, "every": 1, "validation_rows": 10}
        seeds, rates = (0,), {"prompt tuning, vocab": (0.03,), "LoRA": (0.003,)}
    before = RESULTS / f"{name}.json"
    kept = json.loads(before.read_text()) if arguments.only and before.exists() else {}
    if kept and kept["budget"] != budget:
        print(f"{before} was measured with another budget and is left out", file=sys.stderr)
        kept = {}
    with tempfile.TemporaryDirectory(prefix="promptshard-learning-") as temporary:
        results = {side: kept.get(side) for side in ("ours", "ours, with instruction", "peers")}
        files = {
            side: ours.run_file(
                Path(temporary) / f"with-text-{with_text}", budget, seeds, with_text=with_text
            )
            for side, with_text in (("ours", False), ("ours, with instruction", True))
        }
        if arguments.only != "peers":
            print("ours, twice ...", file=sys.stderr, flush=True)
            running = {path: ours.train(path, environment()) for path, _ in files.values()}
            failed = [path for path, process in running.items() if process.wait()]
            if failed:
                sys.exit(failed[0].with_suffix(".log").read_text()[-4000:])
            results |= {side: ours.results(path) for side, (path, _) in files.items()}
        if arguments.only != "ours":
            path, texts = files["ours"]
            peers = Peers(path, arguments.workers, texts, budget, seeds)
            results["peers"] = peers.measure(rates)
    report = summary({"budget": budget, **results})
    text = table(report, f"{name}.png")
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        before.write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(text)
        plot(report, RESULTS / f"{name}.png")
    print(text)


def environment() -> dict[str, str]:
    """Return the environment, with one thread per process, because speed is not measured.

    Trainings run at the same time, so each process gets a port of its own.
    """
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | settings | {"MASTER_PORT": str(free_port())}


class Peers:
    """Trains PEFT's arms on the rows of this trainer's run file."""

    def __init__(
        self,
        path: Path,
        workers: int,
        texts: dict[str, str],
        budget: dict[str, Any],
        seeds: Sequence[int],
    ) -> None:
        self._path, self._workers = path, workers
        self._texts, self._budget, self._seeds = texts, budget, seeds

    def measure(self, rates: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
        """Train with every rate, scored at the last step; then with the best, at all steps."""
        last = [self._budget["steps"]]
        pairs = [(arm, task) for arm in rates for task in self._budget["tasks"]]
        ranges = {pair: list(rates[pair[0]]) for pair in pairs}
        compared = [pair for pair in pairs if len(ranges[pair]) > 1]
        jobs = [job for p in compared for r in ranges[p] for job in self._jobs(p, r, last)]
        done = self._run(jobs)
        for _ in range(MOVES):
            new = {pair: rate for pair in pairs if (rate := moved(ranges[pair], pair, done))}
            if not new:
                break
            for pair, rate in new.items():
                ranges[pair] = within(ranges[pair], rate)
            done += self._run([job for p, rate in new.items() for job in self._jobs(p, rate, last)])
        steps = list(range(self._budget["every"], last[0] + 1, self._budget["every"]))
        best = [
            (pair, best_rate(done, *pair) if pair in compared else ranges[pair][0])
            for pair in pairs
        ]
        curves = self._run([job for pair, rate in best for job in self._jobs(pair, rate, steps)])
        again = {(c["arm"], c["task"], c["rate"]) for c in curves}
        return curves + [d for d in done if (d["arm"], d["task"], d["rate"]) not in again]

    def _jobs(self, pair: tuple[str, str], rate: float, steps: list[int]) -> list[dict[str, Any]]:
        arm, task = pair
        shared = {"arm": arm, "task": task, "rate": rate, "evaluate": steps}
        return [shared | {"seed": seed, "text": self._texts[task]} for seed in self._seeds]

    def _run(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if jobs:
            print(f"{len(jobs)} trainings with PEFT ...", file=sys.stderr, flush=True)
        workers, folder = [], self._path.parent
        for number in range(min(self._workers, len(jobs))):
            todo, out = (folder / f"{what}-{number}" for what in ("jobs", "done"))
            todo.write_text(json.dumps(jobs[number :: self._workers]))
            log = folder / f"log-{number}"
            command = [sys.executable, "-m", "benchmarks.learning.peers"]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [*command, str(self._path), str(todo), str(out)],
                    cwd=ROOT,
                    env=environment(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            workers.append((process, out, log))
        records = []
        for process, out, log in workers:
            if process.wait():
                sys.exit(log.read_text(errors="replace")[-4000:])
            records += [json.loads(line) for line in out.read_text().splitlines()]
        return records


def moved(rates: list[float], pair: tuple[str, str], done: list[dict[str, Any]]) -> float | None:
    """Return the rate beyond the edge if the best rate is at an edge, else None."""
    if len(rates) < 3:
        return None
    best = best_rate(done, *pair)
    if best == rates[0]:
        return float(f"{rates[0] ** 2 / rates[1]:.1g}")
    if best == rates[-1]:
        return float(f"{rates[-1] ** 2 / rates[-2]:.1g}")
    return None


def within(rates: list[float], rate: float) -> list[float]:
    """Return as many rates: the new one is added, and the one at the other edge removed."""
    wider = sorted([*rates, rate])
    return wider[1:] if rate == wider[-1] else wider[:-1]
