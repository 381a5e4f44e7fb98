"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from trainer.config import check_path
from trainer.runtime.errors import BadInput

EXIT_CODES = """\
**Exit codes:** 0 done; 2 invalid input (nothing trained, existing runs untouched); 75 interrupted
(rerun the same command to resume); 1 any other failure.
"""


def as_path(value: str | None) -> str | None:
    """Check that a value can be the name of a file (typer callback)."""
    try:
        check_path(value or "")
    except ValueError as error:
        raise BadInput(str(error)) from None
    return value


RunFile = Annotated[
    str,
    typer.Argument(
        metavar="RUN.yaml", callback=as_path, help="The run file; examples/ has some to copy."
    ),
]
RunDir = Annotated[
    str, typer.Argument(metavar="RUN_DIR", callback=as_path, help="The output_dir of a run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override settings in the file: training.steps=100, prompts.triage.seed=1.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        metavar="N",
        help="Processes on this machine, one per GPU. [default: all visible GPUs, or 2 on CPU]",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start over; move an earlier run in output_dir out of the way."),
]
