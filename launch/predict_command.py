"""The command ``promptshard predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch import completion, messages, preflight
from launch.arguments import InferenceProcesses, RunDir, as_path, option
from launch.start import start_ranks
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput


def predict(
    run_dir: RunDir,
    data: Annotated[
        str,
        option(
            "FILE",
            "Rows with the columns of the task: JSON Lines, CSV, Parquet, or any other format of "
            "training data. Targets are optional.",
            callback=as_path,
        ),
    ],
    out: Annotated[str, option("FILE.jsonl", "Output file, one line per row.", callback=as_path)],
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="NAME")] = None,
    prompt: Annotated[
        list[str] | None,
        option(
            "NAME ...",
            "Prompts to predict with, each a field of every line. [default: all]",
            autocompletion=completion.prompt_names,
        ),
    ] = None,
    ignore_targets: Annotated[
        bool,
        typer.Option(
            "--ignore-targets", help="Do not read the targets, such as a column that is empty."
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Replace FILE.jsonl; predict all rows again.")
    ] = False,
    processes: InferenceProcesses = None,
) -> None:
    """Predict the rows of a file with trained prompts.

    Every line has the number of the row (`row`, from 1), its `id` if the file has such a column,
    and for every prompt an object: `prediction` (the most likely choice, or the generated text),
    `log_probability`, for choices `scores` and `probabilities`, and `nll` if the row has a target.
    Lines are in the order of the rows. Predictions are those of `promptshard evaluate`.

    An interrupted command continues where it stopped: run it again. FILE.jsonl.about.json records
    what the lines depend on.

    **Examples:**

    - `promptshard predict runs/quickstart --data notes.csv --out notes.jsonl --prompt triage`
    - `promptshard predict runs/quickstart --data notes.csv --out notes.jsonl --prompt triage mlp`
    """
    from trainer.commands.predict.output_file import OutputFile
    from trainer.commands.predict.plan import Options, make_plan  # loads Arrow

    if more and not prompt:
        raise BadInput(f"{more[0]}: is not expected; name prompts with --prompt {more[0]}")
    preflight.check_result(run_dir)
    options = Options(
        Path(run_dir),
        (*(prompt or ()), *(more or ())),
        data,
        Path(out),
        ignore_targets=ignore_targets,
        fresh=fresh,
    )
    with Console(sys.stderr, sys.stderr).reading() as on_rows:
        plan = make_plan(options, on_rows)
    output = OutputFile(options.out)
    output.check(plan.identity(options), fresh=fresh)
    if not fresh and output.num_lines() == plan.num_rows:
        messages.note(f"{out}: has all {plan.num_rows:,} rows already")
        raise typer.Exit
    module, arguments = "trainer.commands.predict", options.arguments()
    report = start_ranks(module, arguments, run_dir, processes, None, single=True)
    messages.show(report)
    raise typer.Exit(report.code)
