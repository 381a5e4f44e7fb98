"""Follow a run until it ends: redraw its status on a terminal, or print a line per change."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch import messages
from launch.run_state import Status
from launch.status import StatusReader, best_prompts
from launch.status_text import as_json, as_text, best_score, duration
from trainer.runtime.errors import EXIT_DONE, EXIT_FAILURE, BadInput
from trainer.runtime.redact import printable, redact

#: A run has ended if two reads, this many seconds apart, agree: `train --max-restarts` starts a
#: failed run again within seconds.
CONFIRM_SECONDS = 5.0
#: Seconds between two lines that differ in the step only.
STEP_LINE_SECONDS = 30.0


def watch(
    run_dir: Path,
    seconds: float,
    *,
    json_lines: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show the status every ``seconds`` until the run ends; return the exit code.

    Ctrl-C ends the display with exit code 0. The run continues.

    Args:
        json_lines: print one JSON object per change.

    Raises:
        BadInput: the first read fails. Later, a folder that was deleted ends with exit code 1.
    """
    reader = StatusReader(run_dir)
    status = reader.read()
    display = _lines(json_lines) if json_lines or not sys.stdout.isatty() else _live()
    with _interruptible(), display as show:
        try:
            while True:
                show(status)
                if status.exit_code is not None:
                    sleep(CONFIRM_SECONDS)
                    again = reader.read()
                    if again.exit_code == status.exit_code:
                        show(again)
                        return again.exit_code
                    status = again
                    continue
                sleep(seconds)
                status = _read_again(reader, sleep)
        except KeyboardInterrupt:
            return EXIT_DONE
        except BadInput as error:
            messages.problems(error.problems)
            return EXIT_FAILURE


def _read_again(reader: StatusReader, sleep: Callable[[float], None]) -> Status:
    """Read the status; try a second time, because a file may be replaced at this moment."""
    try:
        return reader.read()
    except BadInput:
        sleep(CONFIRM_SECONDS)
        return reader.read()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` for Ctrl-C in the ``with`` block."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _live() -> Iterator[Callable[[Status], None]]:
    """Yield a function that redraws the status in place; print the last status at the end."""
    console = Console(highlight=False)
    last: Status | None = None

    def show(status: Status) -> None:
        nonlocal last
        last = status
        width, height = console.size
        first, _, rest = as_text(status, width=width, height=height - 2).partition("\n")
        hint = "\nCtrl-C ends this display, not the run"
        live.update(Text(first, "bold") + Text(f"\n{rest}") + Text(hint, "dim"), refresh=True)

    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            yield show
        finally:
            live.update("", refresh=True)
    if last is not None:
        console.print(Text(as_text(last, width=console.width)), soft_wrap=True)


@contextmanager
def _lines(json_lines: bool) -> Iterator[Callable[[Status], None]]:
    """Yield a function that prints a line if the status has changed."""
    shown: dict[str, object] = {}
    printed = -STEP_LINE_SECONDS

    def show(status: Status) -> None:
        nonlocal shown, printed
        state = _state(status)
        changed = [name for name in state if state[name] != shown.get(name)]
        if not changed:
            return
        if changed == ["step"] and time.monotonic() - printed < STEP_LINE_SECONDS:
            return
        shown, printed = state, time.monotonic()
        text = as_json(status, indent=None) if json_lines else _line(status)
        print(text, flush=True)

    yield show


def _state(status: Status) -> dict[str, object]:
    return {
        "state": (status.state, status.description, [task.state for task in status.tasks]),
        "checkpoint": status.checkpoint,
        "best": [(prompt.name, prompt.best_step) for prompt in best_prompts(status)],
        "step": (status.step, [task.step for task in status.tasks]),
    }


def _line(status: Status) -> str:
    if status.exit_code is not None:
        return as_text(status)
    parts = [status.description, f"step {status.step} of {status.steps or '?'}"]
    if status.eta_seconds is not None:
        parts.append(f"about {duration(status.eta_seconds)} left")
    if status.checkpoint is not None:
        parts.append(f"checkpoint step {status.checkpoint}")
    parts += [f"{prompt.name} {best_score(prompt)}" for prompt in best_prompts(status)]
    parts += [f"{Path(task.run_dir).name} {task.state} {task.step}" for task in status.tasks]
    return printable(redact(f"{time.strftime('%H:%M:%S')} {'; '.join(parts)}"))
