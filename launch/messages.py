"""Print messages of the command line to stderr, in color on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from launch.exit_report import ExitReport
from trainer.runtime.errors import EXIT_RESUMABLE
from trainer.runtime.redact import printable, redact


def problems(lines: Sequence[str]) -> None:
    """Print all problems of an input, each with ``FILE:LINE:`` first, which editors recognize."""
    if len(lines) == 1:
        _print("error: ", "bold red", lines[0])
        return
    _print("error: ", "bold red", f"{len(lines)} problems")
    for line in lines:
        _print("  ", "", line)


def show(report: ExitReport) -> None:
    """Print the message of a run that has ended, if any; an interrupted run is not an error."""
    if report.message:
        (note if report.code == EXIT_RESUMABLE else failure)(report.message)


def failure(text: str) -> None:
    _print("error: ", "bold red", text)


def note(text: str) -> None:
    _print("", "", text, style="dim")


def _print(head: str, head_style: str, text: str, style: str = "") -> None:
    # soft_wrap keeps a problem on one line, for grep; in Text, brackets are not markup
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text(head, style=head_style) + Text(printable(redact(text)), style=style))
