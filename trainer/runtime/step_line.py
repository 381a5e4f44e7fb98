"""The line of the newest training step."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.runtime.phases import Phase, clock

#: Without a terminal: seconds without output before a line is printed, at the start of a phase
#: and after a long time.
PLAIN_INTERVAL, LONGEST_INTERVAL = 5.0, 60.0


class StepLine:
    """The newest step: updated in place on a terminal, printed every few seconds elsewhere.

    Args:
        show_line: prints a line.
        phase: the training phase, which a terminal displays.
        live: whether the output is a terminal.
    """

    def __init__(self, show_line: Callable[[str], None], phase: Phase, *, live: bool) -> None:
        self._print, self._phase, self._live = show_line, phase, live
        self._printed = float("-inf")
        self._unprinted = ""

    def show(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        phase, steps = self._phase, self._phase.total
        phase.done = step
        phase.status = f"loss {loss:.4f}  {tokens_per_second:,.0f} tok/s  ETA {clock(seconds_left)}"
        self._unprinted = f"step {step}/{steps:.0f}  {phase.status}"
        now = time.monotonic()
        if not self._live and now - self._printed >= plain_interval(phase.seconds / 10):
            self._printed = now
            self.end()

    def plain(self) -> str:
        """Return the newest step if it is not printed yet, or which step is running."""
        text, self._unprinted = self._unprinted, ""
        if text:
            self._printed = time.monotonic()
        return text or f"step {self._phase.done + 1:.0f}/{self._phase.total:.0f} is running"

    def end(self) -> None:
        """Print the newest step unless already printed."""
        if self._unprinted:
            self._print(self._unprinted)
            self._unprinted = ""


def plain_interval(seconds: float) -> float:
    """Limit seconds between two lines without a terminal."""
    return min(LONGEST_INTERVAL, max(PLAIN_INTERVAL, seconds))
