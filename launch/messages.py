"""What the command line says to a person, on stderr: coloured on a terminal, plain elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

#: Seconds of reading before it is shown, and from line to line where there is no terminal.
PATIENCE_SECONDS, PLAIN_SECONDS = 2.0, 10.0


def problems(lines: Sequence[str]) -> None:
    """All problems of an input in one message. ``FILE:LINE:`` stands first, so editors can jump."""
    if len(lines) == 1:
        _print("error: ", "bold red", lines[0])
        return
    _print("error: ", "bold red", f"{len(lines)} problems")
    for line in lines:
        _print("  ", "", line)


def failure(text: str) -> None:
    _print("error: ", "bold red", text)


def note(text: str) -> None:
    _print("", "", text, style="dim")


@contextmanager
def reading() -> Iterator[Callable[[str, int], None]]:
    """A live line on a terminal, elsewhere one now and then, while rows are read.

    Yields:
        What to tell the file's name and the number of its rows read so far.
    """
    console = Console(stderr=True, highlight=False)
    status = console.status("")
    due = time.monotonic() + PATIENCE_SECONDS

    def said(name: str, rows: int) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        text = f"reading {name}: {rows:,} rows"
        if console.is_terminal:
            due = time.monotonic() + 0.1
            status.update(Text(text))
            status.start()
        else:
            due = time.monotonic() + PLAIN_SECONDS
            note(text)

    try:
        yield said
    finally:
        status.stop()


def _print(head: str, head_style: str, text: str, style: str = "") -> None:
    # soft_wrap: a problem stays one line, for whoever greps; Text: what people wrote is no markup
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text(head, style=head_style) + Text(text, style=style))
