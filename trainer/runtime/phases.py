"""Phases of a run: progress of a running phase, and seconds per phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import TaskID


@dataclass
class Phase:
    """A running phase. Any thread may set its attributes."""

    what: str
    total: float | None = None  #: in ``unit``; None if unknown
    unit: str = "rows"  #: ``bytes`` are shown as MB
    done: float = 0.0
    status: str = ""  #: text after the numbers
    started: float = field(default_factory=lambda: time.monotonic())
    task: TaskID | None = None

    def advance(self, count: float) -> None:
        self.done += count

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def progress(self) -> str:
        """Return ``1,200/3,400 rows, about 0:20 left``; empty if nothing is counted."""
        parts = []
        if self.total is not None:
            parts.append(f"{self._number(self.done)}/{self.size}")
            if self.done and not self.status:
                left = self.seconds * max(0.0, self.total - self.done) / self.done
                parts.append(f"about {clock(left)} left")
        elif self.done:
            parts.append(f"{self._number(self.done)} {self._unit}")
        return ", ".join([*parts, *([self.status] if self.status else [])])

    @property
    def size(self) -> str:
        """Total with unit: ``3,400 rows``, ``12.0 MB``."""
        return f"{self._number(self.total or 0)} {self._unit}"

    @property
    def _unit(self) -> str:
        return "MB" if self.unit == "bytes" else self.unit

    def _number(self, value: float) -> str:
        return f"{value / 1e6:,.1f}" if self.unit == "bytes" else f"{value:,.0f}"


class PhaseTimes:
    """Seconds of named phases; those of a nested phase do not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  #: in the order in which the phases first started
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
        """Return the seconds per phase and their ``total``."""
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
