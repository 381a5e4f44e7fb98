"""The command ``promptshard inspect``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from launch import completion, messages, preflight
from launch.arguments import Overrides, Processes, as_path, option, path_argument
from launch.start import run_alone, start_ranks
from trainer.commands.evaluate.selection import check_data
from trainer.commands.inspect_prompts.options import ROWS, Options
from trainer.config import RunConfig
from trainer.runtime.errors import BadInput

#: Default of ``--rows`` with ``--base``.
BASE_ROWS = 64


def inspect(
    target: Annotated[
        str,
        path_argument(
            "RUN_DIR|RUN.yaml|MODEL",
            "The output_dir of a run; with --base also a run file, or a model's folder or hub id.",
        ),
    ],
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None,
        option(
            "NAME",
            "Only this trained prompt; repeatable. [default: all]",
            autocompletion=completion.prompt_names,
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Drop virtual tokens whose removal does not hurt, score the shorter prompt on "
            "other rows, and write its adapter to RUN_DIR/pruned/NAME.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        option("FILE", "Rows in place of the task's validation rows.", callback=as_path),
    ] = None,
    demonstration: Annotated[
        list[str] | None,
        option(
            "TEXT",
            "Description of another task with its classes, after which the base describes the "
            "prompt; repeatable. [default: three general ones]",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Measure the error of int8 storage instead.")
    ] = False,
    rows: Annotated[
        int | None,
        option(
            "N",
            f"Validation rows to score per task. [default: {ROWS}; {BASE_ROWS} with --base]",
            min=1,
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        option(
            "FILE",
            "Output file for all numbers; -: stdout. [default: inspection.json in RUN_DIR; "
            "base_inspection.json with --base]",
            "--json",
            callback=as_path,
        ),
    ] = None,
    processes: Processes = None,
) -> None:
    """Show what the virtual tokens of trained prompts do; or, with --base, the error of int8.

    For each virtual token: the change of the loss when it is left out, the attention that it
    receives, gradient times input, nearest tokens of the vocabulary, norm, and distance from its
    start. For each prompt, also at its checkpoints: what the base writes when it is asked to
    describe the prompt's hidden states (InSPEcT). Always beside a random prompt of equal norms,
    the initial prompt, and a prompt of another task. Nearest tokens can be arbitrary.

    With --base, one line per layer: relative error, worst-row error, share of rows with outliers.
    Then validation losses for the original model and for int8 with each `base.matmul` that works
    here. For a MODEL, weights only.

    **Examples:**

    - `promptshard inspect runs/quickstart`
    - `promptshard inspect runs/quickstart --prompt triage --prune`
    - `promptshard inspect runs/quickstart --base --rows 200`
    - `promptshard inspect run.yaml --base base.head=int8`
    - `promptshard inspect meta-llama/Llama-3.1-8B --base base.embeddings=int8 --json errors.json`
    """
    if base:
        given = {"--prompt": prompt, "--prune": prune, "--data": data}
        given |= {"--demonstration": demonstration}
        if used := [name for name, value in given.items() if value]:
            raise BadInput(f"{', '.join(used)}: for prompts; leave out --base to inspect prompts")
        _inspect_base(target, overrides or [], rows or BASE_ROWS, json_file, processes)
    if overrides:
        raise BadInput(
            f"{overrides[0]}: the prompts of a run are inspected with its own settings; "
            "KEY=VALUE needs --base"
        )
    _check_run_dir(target)
    if json_file not in (None, "-"):
        json_file = str(preflight.check_new_file(Path(json_file or "")))
    options = Options(
        Path(target),
        tuple(prompt or ()),
        data,
        rows or ROWS,
        tuple(demonstration or ()),
        prune=prune,
        json=json_file,
    )
    for note in check_data(options.selected_run()):
        messages.note(note)
    module = "trainer.commands.inspect_prompts"
    output = str(preflight.measurements_folder(target))
    report = start_ranks(module, options.arguments(), output, processes, None)
    messages.show(report)
    raise typer.Exit(report.code)


def _check_run_dir(target: str) -> None:
    """Raise ``BadInput`` unless the target is a run's output folder."""
    if Path(target).suffix in (".yaml", ".yml"):
        raise BadInput(
            f"{target}: is a run file, which has no trained prompt; give the output_dir of its "
            "run, or --base for the error of int8 storage"
        )
    if os.path.isfile(Path(target) / "config.json") and not preflight.is_run_dir(target):
        raise BadInput(f"{target}: is a model; add --base for the error of int8 storage")
    preflight.check_result(target)


def _inspect_base(
    target: str,
    overrides: list[str],
    rows: int,
    json_file: str | None,
    processes: int | None,
) -> None:
    """Measure the error of int8 storage, and exit."""
    checked = preflight.check_target(target, overrides)
    if json_file is None and preflight.is_run_dir(target):
        json_file = str(Path(target) / "base_inspection.json")
    # --name=VALUE as one argument: a name may start with a dash
    arguments = [target, *overrides]
    if json_file:
        new = json_file if json_file == "-" else preflight.check_new_file(Path(json_file))
        arguments.append(f"--json={new}")
    module = "trainer.commands.inspect"
    if not isinstance(checked, RunConfig):
        raise typer.Exit(run_alone(module, ["--model", *arguments]))
    arguments.append(f"--rows={rows}")
    report = start_ranks(module, arguments, checked.output_dir, processes, None)
    messages.show(report)
    raise typer.Exit(report.code)
