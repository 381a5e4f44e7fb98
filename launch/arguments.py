"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from launch import completion
from trainer.config import check_path
from trainer.runtime.errors import BadInput

EXIT_CODES = """\
**Exit codes:** 0 done; 2 invalid input (nothing trained, existing runs untouched); 75 interrupted
(rerun the same command to resume); 1 any other failure.
"""


def as_path(value: str | None) -> str | None:
    """Check that a value can be the name of a file (typer callback).

    The ranks would read a leading dash as an option, so ``./`` is added (but "-" means stdout).
    """
    try:
        check_path(value or "")
    except ValueError as error:
        raise BadInput(str(error)) from None
    return f"./{value}" if value and value.startswith("-") and value != "-" else value


def option(metavar: str, text: str | None = None, *names: str, **settings: Any) -> Any:
    """Declare an option that takes a value; without ``names`` it is named after the parameter."""
    return typer.Option(*names, metavar=metavar, help=text, **settings)


def path_argument(metavar: str, text: str, **settings: Any) -> Any:
    return typer.Argument(metavar=metavar, callback=as_path, help=text, **settings)


RunFile = Annotated[
    str,
    path_argument(
        "RUN.yaml",
        "The run file; promptshard init writes one.",
        autocompletion=completion.run_files,
    ),
]
RunDir = Annotated[str, path_argument("RUN_DIR", "The output_dir of a run.")]
NewFolder = Annotated[str, path_argument("OUT", "A new folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override settings in the file: training.steps=100, prompts.triage.seed=1.",
        autocompletion=completion.overrides,
    ),
]
Processes = Annotated[
    int | None,
    option("N", "Processes on this machine, one per GPU. [default: all visible GPUs, or 2 on CPU]"),
]
InferenceProcesses = Annotated[
    int | None,
    option("N", "Processes on this machine, one per GPU. [default: all visible GPUs, or 1 on CPU]"),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start over; move an earlier run in output_dir out of the way."),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Print every prompt at every validation, all rows of the final table, and details "
        "of the base. Otherwise a task with three or more prompts has one line per validation.",
    ),
]
