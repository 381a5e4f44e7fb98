"""The commands ``promptshard status`` and ``promptshard list``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from launch import status_text
from launch.arguments import RunDir, option, path_argument
from launch.run_list import list_runs
from launch.status import read_status
from launch.status_watch import watch as watch_run
from trainer.runtime.errors import BadInput

WATCH_SECONDS = 2.0
STATUS_EPILOG = """\
**States:** waiting (in Slurm); running; finished; failed; stopped (rerun to resume); dead (the
process is gone but did not release run.lock, or has sent no heartbeat for two minutes).

**Exit codes:** 0 done; 2 invalid input; with --watch also 75 interrupted (rerun the same command to
resume) and 1 failed, dead, or RUN_DIR deleted. Ctrl-C ends --watch with 0; the run continues.
"""


class StatusCommand(TyperCommand):
    """A command whose option ``--watch`` has an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for word, following in zip(args, [*args, ""][1:], strict=True):
            bare = word == "--watch" and not _is_number(following)
            words.append(f"{word}={WATCH_SECONDS:g}" if bare else word)
        return super().parse_args(ctx, words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def status(
    run_dir: RunDir,
    watch: Annotated[
        str | None,
        option(
            "[SECONDS]",
            "Update the status until the run ends, every SECONDS (2 if left out): in place on a "
            "terminal, elsewhere one line per change.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Machine-readable output; with --watch one object per line."),
    ] = False,
) -> None:
    """Show whether a run is running, stopped, dead, finished or failed, and how far it is.

    Shows process and host, step, time left, speed, last checkpoint and, for every prompt, step,
    training loss and best validation score. For a run that has stopped: the command that resumes
    it. For one that has failed: the error and the last lines of the log that explains it.

    Reads RUN_DIR (`run.lock`, `metrics.jsonl`, `summary.json`, `logs`) and Slurm, and writes
    nothing.

    **Examples:**

    - `promptshard status runs/quickstart`
    - `promptshard status runs/quickstart --watch`
    - `promptshard status runs/quickstart --watch 60 > status.log && echo finished`
    - `promptshard status runs/quickstart --json | jq .state`
    """
    if watch is not None:
        if not (_is_number(watch) and 0 < float(watch) < math.inf):
            raise BadInput(f"--watch: {watch!r} is not a number of seconds above 0; give 2 or more")
        raise typer.Exit(watch_run(Path(run_dir), float(watch), json_lines=as_json))
    report = read_status(Path(run_dir))
    text = status_text.as_json(report) if as_json else status_text.as_text(report, width=_width())
    typer.echo(text)


def list_(
    folder: Annotated[str, path_argument("DIR", "Folder to search, with the folders in it.")] = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """List all runs below a folder: state, step, best score and age, newest first.

    A run is the output_dir of `promptshard train` or `submit`. Hidden folders and virtual
    environments are not searched. A damaged run is listed as `unknown` with the reason.

    **Examples:**

    - `promptshard list`
    - `promptshard list runs --json | jq '.[] | select(.state == "stopped") | .resume'`
    """
    with _progress() as on_run:
        runs = list_runs(Path(folder), on_run)
    if as_json:
        typer.echo(status_text.list_json(runs))
    elif runs:
        typer.echo(status_text.as_list(runs, width=_width()))
    else:
        typer.echo(
            f"no runs below {folder}; start one with `promptshard train RUN.yaml`, or give the "
            "folder of your runs"
        )


def _width() -> int:
    return Console().width if sys.stdout.isatty() else status_text.PLAIN_WIDTH


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Yield a function that displays the number of runs read; without a terminal, nothing."""
    console = Console(stderr=True)
    with console.status("searching for runs") as display:
        yield lambda number: display.update(f"reading runs: {number}")
