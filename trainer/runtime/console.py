"""Output of rank 0: a live progress display on a terminal, plain lines elsewhere.

Long operations are a ``Phase`` each. On a terminal, each running phase has a progress bar;
elsewhere, a thread prints the innermost phase after ``plain_interval`` seconds without output.
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

import rich.console
import rich.text
from rich.box import SIMPLE_HEAD
from rich.console import ConsoleDimensions
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trainer.runtime.phases import Phase
from trainer.runtime.redact import printable, redact
from trainer.runtime.step_line import StepLine, plain_interval

#: Shorter phases are not displayed.
QUIET_SECONDS = 1.0
#: Seconds between two updates of the display.
TICK = 0.25
#: Without a terminal: width of a table in characters.
PLAIN_WIDTH = 110


class _RichConsole(rich.console.Console):
    """A rich console with the size of its own stream: standard streams are redirected to a log."""

    @property
    def size(self) -> ConsoleDimensions:
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):
            return super().size
        # Terminals of containers and of tools such as script may report a size of 0 by 0.
        unknown = ConsoleDimensions(80, 25)
        return ConsoleDimensions(
            self._width or columns or unknown.width, self._height or lines or unknown.height
        )

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self._width, self._height = new


class Console:
    """Prints messages, tables and progress for the user.

    Args:
        log: log file that error messages refer to.
        answer: stream of ``answer``; default: ``out``.
        shown: False on ranks other than 0, which display no phases.

    Attributes:
        verbose: whether details are printed, not only logged.
    """

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        log: Path | None = None,
        *,
        answer: TextIO | None = None,
        shown: bool = True,
    ) -> None:
        self._log, self._shown, self.verbose = log, shown, False
        self._answer = answer or out
        self._reported: BaseException | None = None
        width = None if out.isatty() else PLAIN_WIDTH
        self._out = _RichConsole(file=out, width=width, highlight=False, soft_wrap=True)
        self._err = _RichConsole(file=err, highlight=False, soft_wrap=True)
        self._phases: list[Phase] = []
        self._lock = threading.Lock()  # a phase must not end while the thread displays it
        self._last_output = time.monotonic()
        self._ticker: threading.Thread | None = None
        self._stop = threading.Event()
        self._bar: Progress | None = None

    @property
    def is_terminal(self) -> bool:
        return self._out.is_terminal

    @property
    def width(self) -> int:
        """Width of the terminal in characters, or ``PLAIN_WIDTH``."""
        return self._out.width

    def print(self, text: str = "") -> None:
        """Print a line on stdout."""
        self._write(self._out, text)

    def detail(self, text: str) -> None:
        """Print a line on stdout if ``verbose``, else only into the log file."""
        if self.verbose:
            self.print(text)
        elif self._log is not None:  # the process's stderr is this file
            sys.stderr.write(f"{text}\n")

    def paragraph(self, text: str, indent: int = 0) -> None:
        """Print a long text on stdout; on a terminal, break its lines between words.

        Args:
            indent: spaces before all lines but the first.
        """
        if self._out.is_terminal:
            text = textwrap.fill(
                text,
                self.width,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        self.print(text)

    def note(self, text: str) -> None:
        """Print a line on stderr that is neither a warning nor an error."""
        self._write(self._err, text)

    def answer(self, text: str) -> None:
        """Print the result of a command verbatim: no wrapping, styles or emoji codes."""
        self._last_output = time.monotonic()
        if self._answer.isatty():
            text = printable(text)
        self._answer.write(f"{text}\n")
        self._answer.flush()

    def warn(self, text: str) -> None:
        self._write(self._err, f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        self._write(self._err, f"error: {text}", "red")

    def _write(self, console: rich.console.Console, text: str, style: str | None = None) -> None:
        self._last_output = time.monotonic()
        console.print(_safe(text), style=style, markup=False)

    def failure(self, error: BaseException) -> None:
        """Print the first line of the error that ends the run; only once per error."""
        if error is not self._reported:
            self._reported = error
            where = f" (full message in {self._log})" if self._log and self._log.exists() else ""
            self.error(f"{type(error).__name__}: {_essence(error)}{where}")

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: int = 1,
        groups: Sequence[int] = (),
        bold: Collection[int] = (),
        wrap: bool = True,
    ) -> None:
        """Print a table.

        Args:
            left: number of columns that are aligned to the left.
            groups: indices of the rows below which there is a line.
            bold: indices of bold rows.
            wrap: break cells that do not fit into lines; False: the caller has fitted the cells.
        """
        table = Table(title=title, title_justify="left", title_style="bold")
        if not wrap:
            table.box, table.show_edge, table.pad_edge = SIMPLE_HEAD, False, False
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < left else "right", no_wrap=not wrap)
        for i, row in enumerate(rows):
            cells = [rich.text.Text(_safe(cell)) for cell in row]
            table.add_row(*cells, style="bold" if i in bold else None, end_section=i in groups)
        width = self._out.width
        if not wrap and not self._out.is_terminal:
            self._out.width = 10_000
        self._out.print(table)
        self._out.width = width

    @contextmanager
    def phase(
        self,
        what: str,
        total: float | None = None,
        unit: str = "rows",
        done: float = 0.0,
        *,
        announce: bool = False,
    ) -> Iterator[Phase]:
        """Display a phase while the block runs; without a terminal, ``announce`` prints a line."""
        phase = Phase(what, total, unit, done)
        if announce and not self._out.is_terminal:
            self.print(what if total is None else f"{what} ({phase.size})")
        with self._lock:
            self._phases.append(phase)
        if self._shown and self._ticker is None:
            self._stop.clear()
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()
        try:
            yield phase
        finally:
            with self._lock:
                self._phases.remove(phase)
                if phase.task is not None and self._bar is not None:
                    self._bar.remove_task(phase.task)
            if not self._phases and self._ticker is not None:
                self._stop.set()
                self._ticker.join()
                self._ticker = None
                if self._bar is not None:
                    self._bar.stop()
                    self._bar = None

    def _tick(self) -> None:
        while not self._stop.wait(TICK):
            self.refresh()

    def refresh(self) -> None:
        """Update the display; a thread calls this several times per second."""
        with self._lock:
            if self._out.is_terminal:
                for phase in self._phases:
                    self._draw(phase)
            elif self._phases:
                phase, silence = self._phases[-1], time.monotonic() - self._last_output
                is_long = phase.seconds >= QUIET_SECONDS
                if is_long and silence >= plain_interval(phase.seconds / 2):
                    self.print(phase.plain_line())

    def _draw(self, phase: Phase) -> None:
        if phase.task is None:
            if phase.seconds < QUIET_SECONDS:
                return
            if self._bar is None:
                self._bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=24),
                    TextColumn("{task.fields[status]}"),
                    TimeElapsedColumn(),
                    console=self._out,
                    transient=True,
                    redirect_stdout=False,  # output of libraries stays in the log
                    redirect_stderr=False,
                )
                self._bar.start()
            phase.task = self._bar.add_task("", status="", visible=False)
        assert self._bar is not None
        self._bar.update(
            phase.task,
            completed=phase.done,
            total=phase.total,
            description=escape(phase.what),
            status=escape(phase.progress()),
            visible=True,
            refresh=True,
        )

    def loading(self, what: str, total_bytes: int) -> AbstractContextManager[Phase]:
        """Display a phase that counts bytes."""
        return self.phase(what, total_bytes, "bytes", announce=True)

    @contextmanager
    def downloading(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yield ``update(done, total)`` of a download, in bytes; both may grow.

        Without an update, such as for a local folder, the display says ``opening``.
        """
        with self.phase(f"opening {what}", unit="bytes") as phase:

            def update(done: int, total: int) -> None:
                is_first, phase.done, phase.total = phase.total is None, done, total
                phase.what = f"downloading {what}"
                if is_first and not self._out.is_terminal:
                    self.print(f"{phase.what} ({phase.size})")

            yield update

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, int], None]]:
        """Yield ``update(file, number of rows read so far)``."""
        with self.phase("reading rows") as phase:

            def update(name: str, rows: int) -> None:
                phase.what, phase.done = f"reading {name}", rows

            yield update

    @contextmanager
    def working(self, what: str, total: int) -> Iterator[Callable[[float], None]]:
        """Yield ``advance(number of further rows done)``."""
        with self.phase(what, total) as phase:
            yield phase.advance

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[StepLine]:
        """Display step, loss, useful tokens per second and ETA of the training loop."""
        with self.phase("training", steps, "steps", done) as phase:
            line = StepLine(self.print, phase, live=self.is_terminal)
            phase.plain = line.plain
            yield line
            line.end()


def _safe(text: str) -> str:
    return printable(redact(text))


def _essence(error: BaseException) -> str:
    """Return the first line of an error; if GPU memory ran out, what was needed and a remedy."""
    first_line = str(error).strip().split("\n")[0]
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which this module does not import
        return first_line
    needed = ". ".join(first_line.split(". ")[:2]).rstrip(".")
    return (
        f"{needed}; use more GPUs, so that each holds less of the base, or end other programs that "
        "use this one"
    )
