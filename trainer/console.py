"""What rank 0 shows a person: a live progress line on a terminal, plain lines otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import rich.console
import rich.text
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

#: Seconds between plain lines where there is no terminal.
PLAIN_INTERVAL = 5.0
#: Work that takes less is not shown.
QUIET_SECONDS = 1.0
#: Files of fewer rows are read in a moment.
MANY_ROWS = 10_000
#: Columns of a table where there is no terminal to ask.
PLAIN_WIDTH = 110

_BYTES = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())


class Console:
    """Rank 0's words; on other ranks ``out`` leads nowhere."""

    def __init__(self, out: TextIO, err: TextIO, log: Path | None = None) -> None:
        self._log = log
        self._told: BaseException | None = None
        width = None if out.isatty() else PLAIN_WIDTH
        self._out = rich.console.Console(file=out, width=width, highlight=False, soft_wrap=True)
        self._err = rich.console.Console(file=err, highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        self._out.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._err.print(f"warning: {text}", style="yellow", markup=False)

    def error(self, text: str) -> None:
        self._err.print(f"error: {text}", style="red", markup=False)

    def failure(self, error: BaseException) -> None:
        """What ends the run, in one line, once."""
        if error is not self._told:
            self._told = error
            first_line = str(error).strip().split("\n")[0]
            where = f" (all of it: {self._log})" if self._log else ""
            self.error(f"{type(error).__name__}: {first_line}{where}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._out.print(table)

    @contextmanager
    def loading(self, what: str, total_bytes: int) -> Iterator[Loading]:
        """A bar with bytes while the base is read."""
        bar = self._bar(*_BYTES)
        if not self._out.is_terminal:
            self.say(f"{what} ({total_bytes / 1e6:,.1f} MB)")
        with bar:
            yield Loading(bar, bar.add_task(what, total=total_bytes))

    @contextmanager
    def downloading(self, what: str) -> Iterator[Downloading]:
        """A bar with bytes while files come over a network; nothing if none do."""
        bar = self._bar(*_BYTES)
        shown = Downloading(self, bar, f"downloading {what}")
        try:
            yield shown
        finally:
            shown.close()

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, int], None]]:
        """A live line on a terminal, elsewhere one now and then, while files are read.

        Yields:
            What to tell the file's name and how many of its rows were read so far.
        """
        status = self._out.status("")
        due = time.monotonic() + (QUIET_SECONDS if self._out.is_terminal else PLAIN_INTERVAL)

        def said(name: str, rows: int) -> None:
            nonlocal due
            if rows < MANY_ROWS or (now := time.monotonic()) < due:
                return
            text = f"reading {name}: {rows:,} rows"
            if self._out.is_terminal:
                due = now + 0.1
                status.update(rich.text.Text(text))
                status.start()
            else:
                due = now + PLAIN_INTERVAL
                self.say(text)

        try:
            yield said
        finally:
            status.stop()

    @contextmanager
    def working(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for what may take long; nothing is shown before ``QUIET_SECONDS`` are over.

        Yields:
            What to call with the number of rows that were just done.
        """
        bar = self._bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} rows"),
            TimeRemainingColumn(),
        )
        task = bar.add_task(what, total=total)
        started, shown = time.monotonic(), False

        def advance(rows: int) -> None:
            nonlocal shown
            bar.advance(task, rows)
            if not shown and time.monotonic() - started > QUIET_SECONDS:
                shown = True
                bar.start()
                if bar.disable:
                    self.say(f"{what} ({total:,} rows)")

        try:
            yield advance
        finally:
            bar.stop()

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[StepLine]:
        """The progress line of a run: step, loss, useful tokens per second, time left."""
        bar = self._bar(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
        )
        with bar:
            yield StepLine(self, bar, bar.add_task("", total=steps, completed=done, status=""))

    def _bar(self, *columns: ProgressColumn) -> Progress:
        """A bar on a terminal; elsewhere one that shows nothing."""
        return Progress(*columns, console=self._out, disable=not self._out.is_terminal)


class Loading:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)


class Downloading:
    """Call it, from any thread, with the bytes that are here and those to come; both may grow."""

    def __init__(self, console: Console, bar: Progress, what: str) -> None:
        self._console, self._bar, self._what = console, bar, what
        self._task: TaskID | None = None
        self._last_plain = float("-inf")
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            if self._task is None:  # not before: an empty bar would be a blank line
                self._task = self._bar.add_task(self._what)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
            now = time.monotonic()
            if self._bar.disable and now - self._last_plain >= PLAIN_INTERVAL:
                self._last_plain = now
                self._console.say(f"{self._what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

    def close(self) -> None:
        if self._task is not None:
            self._bar.stop()


class StepLine:
    """Shows the newest step; on a terminal in place, elsewhere every few seconds."""

    def __init__(self, console: Console, bar: Progress, task: TaskID) -> None:
        self._console, self._bar, self._task = console, bar, task
        self._last_plain = float("-inf")

    def show(
        self, step: int, steps: int, loss: float, tokens_per_second: float, seconds_per_step: float
    ) -> None:
        left = (steps - step) * seconds_per_step
        status = f"loss {loss:.4f}  {tokens_per_second:,.0f} tok/s  ETA {_clock(left)}"
        self._bar.update(self._task, completed=step, status=status)
        now = time.monotonic()
        due = now - self._last_plain >= PLAIN_INTERVAL or step == steps
        if self._bar.disable and due:
            self._last_plain = now
            self._console.say(f"step {step}/{steps}  {status}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
