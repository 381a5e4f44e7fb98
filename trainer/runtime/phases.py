"""Phases of a run: progress of a running phase, and seconds per phase."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice

from rich.progress import TaskID


@dataclass
class Phase:
    """A running phase. Any thread may set its attributes."""

    what: str
    total: float | None = None  #: in ``unit``; None if unknown
    unit: str = "rows"  #: ``bytes`` are shown as MB
    done: float = 0.0
    status: str = ""  #: text after the numbers
    plain: Callable[[], str] | None = None  #: returns the line without a terminal; None: progress
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

    def plain_line(self) -> str:
        """Return the line that is printed without a terminal."""
        if self.plain is not None:
            return self.plain()
        return f"{self.what}: {self.progress() or clock(self.seconds)}"

    @property
    def size(self) -> str:
        """Total with unit: ``3,400 rows``, ``12.0 MB``."""
        return f"{self._number(self.total or 0)} {self._unit}"

    @property
    def _unit(self) -> str:
        return "MB" if self.unit == "bytes" else self.unit

    def _number(self, value: float) -> str:
        return f"{value / 1e6:,.1f}" if self.unit == "bytes" else f"{value:,.0f}"


#: Phases of a training run whose seconds are shown, in this order.
PHASES = (
    "start",
    "data",
    "loading the base",
    "initialization search",
    "baselines",
    "training",
    "validation",
    "saving",
    "results",
)
#: Phase of the seconds outside all other phases.
OTHER = "other"


class PhaseTimes:
    """Seconds of named phases. Each second counts for one phase: the innermost that is running.

    Seconds outside all phases count for ``OTHER``, so that the phases add up to the elapsed time.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}  # in the order in which the phases first started
        self._running = [OTHER]
        self._counted_until = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._count()
        self._seconds.setdefault(name, 0.0)
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def _count(self) -> None:
        now, name = time.perf_counter(), self._running[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._counted_until
        self._counted_until = now

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per phase until now, ``OTHER`` last."""
        self._count()
        named = {name: value for name, value in self._seconds.items() if name != OTHER}
        return named | {OTHER: self._seconds.get(OTHER, 0.0)}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds before this object was created, such as those of an earlier process."""
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value

    def summary(self) -> dict[str, float]:
        """Return the seconds per phase and their ``total``."""
        seconds = self.seconds
        return {**seconds, "total": sum(seconds.values())}


def breakdown(seconds: Mapping[str, float]) -> str:
    """Return ``1:23 = start 0:10 (12%) + training 1:13 (88%)``; the parts add up to the total.

    Phases under a second count for ``OTHER``.
    """
    total = seconds["total"]
    parts = {k: v for k, v in seconds.items() if k not in (OTHER, "total") and v >= 1}
    if (rest := total - sum(parts.values())) >= 1:
        parts[OTHER] = rest
    if not parts:
        return clock(total)
    rounded = _rounded(list(parts.values()), round(total))
    shown = sum(parts.values())
    shares = _rounded([100 * value / shown for value in parts.values()], 100)
    texts = [
        f"{name} {clock(value)} ({share}%)"
        for name, value, share in zip(parts, rounded, shares, strict=True)
    ]
    return f"{clock(round(total))} = {' + '.join(texts)}"


def _rounded(values: Sequence[float], total: int) -> list[int]:
    """Round to integers with this sum, by the largest remainders."""
    floors = [math.floor(value) for value in values]
    by_remainder = sorted(range(len(values)), key=lambda i: floors[i] - values[i])
    for i in islice(cycle(by_remainder), total - sum(floors)):
        floors[i] += 1
    return floors


def clock(seconds: float) -> str:
    """Format seconds as ``0:05`` or ``1:02:03``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
