"""Measure the seconds of a run by phase. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class PhaseTimes:
    """Sums up the seconds of named phases.

    The time of a nested phase is subtracted from the outer one, so no second is counted twice.

    Attributes:
        seconds: by name, in the order in which the phases first started.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._nested: list[float] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.seconds.setdefault(name, 0.0)
        self._nested.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.seconds[name] += seconds - self._nested.pop()
            if self._nested:
                self._nested[-1] += seconds

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the phases of an earlier process of the same run."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def summary(self) -> dict[str, float]:
        """Return the seconds by phase and their ``total``."""
        return {**self.seconds, "total": sum(self.seconds.values())}


def breakdown(seconds: Mapping[str, float]) -> str:
    """Return ``1:23 (start 0:10, load 0:03, ...)``, without phases under half a second."""
    parts = [
        f"{name} {clock(value)}"
        for name, value in seconds.items()
        if name != "total" and value >= 0.5
    ]
    return f"{clock(seconds['total'])} ({', '.join(parts)})"


def clock(seconds: float) -> str:
    """Format seconds as ``0:05`` or ``1:02:03``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
