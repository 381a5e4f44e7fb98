"""The state of a run in ``metrics.jsonl``: step, pace, and latest and validation scores."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines

#: A gap longer than this many median step times is a pause, in which the run was stopped.
PAUSE = 20
#: The pace of a run is computed from this many latest steps, its speed from fewer.
RECENT, RECENT_SPEEDS = 200, 20
#: Size of the end of a large file of which all lines are read; of a list of runs, a smaller one.
TAIL_BYTES, QUICK_TAIL_BYTES = 1 << 22, 1 << 16


class RunMetrics:
    """Reads the metrics of one run; ``update`` reads the lines that were added since.

    Attributes:
        step: newest step, 0 without metrics.
        written: time of the newest line in Unix seconds.
        latest: prompt -> metric -> (step, latest value).
        validations: prompt -> step -> validation scores.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_FILE
        self._clear()

    def _clear(self) -> None:
        self._offset, self._inode = 0, (0, 0)
        self._times: dict[int, float] = {}
        self._speeds: deque[float] = deque(maxlen=RECENT_SPEEDS)
        self.step = 0
        self.written: float | None = None
        self.latest: dict[str, dict[str, tuple[int, float]]] = {}
        self.validations: dict[str, dict[int, dict[str, float]]] = {}

    def update(self, tail_bytes: int = TAIL_BYTES) -> None:
        """Read new lines; read a file that was replaced from its beginning.

        Args:
            tail_bytes: at the first read, of lines before the last ``tail_bytes`` only those with
                validation scores are parsed.
        """
        try:
            file = self.path.stat()
            inode = (file.st_dev, file.st_ino)
            if inode != self._inode or file.st_size < self._offset:
                self._clear()
                self._inode = inode
            if self._offset == 0 and file.st_size > tail_bytes:
                for line, _ in read_lines(self.path, containing=b'"validation'):
                    self._add(line)
                self._offset = file.st_size - tail_bytes
                self._times.clear()
            for line, end in read_lines(self.path, self._offset):
                self._offset = end
                self._add(line)
        except OSError:  # missing, a folder, or not readable
            return

    def _add(self, line: Line | None) -> None:
        if line is None or not math.isfinite(line.time):
            return
        self._times[line.step] = line.time
        self.step = max(self.step, line.step)
        self.written = max(self.written or 0.0, line.time)
        if line.prompt is None:
            speed = line.metrics.get("useful_tokens_per_second", math.nan)
            if math.isfinite(speed):
                self._speeds.append(speed)
            return
        latest = self.latest.setdefault(line.prompt, {})
        latest |= {name: (line.step, value) for name, value in line.metrics.items()}
        if line.is_validation:
            self.validations.setdefault(line.prompt, {})[line.step] = line.metrics

    @property
    def tokens_per_second(self) -> float | None:
        """Median of the useful tokens per second of recent steps; None if unknown."""
        return statistics.median(self._speeds) if self._speeds else None

    @property
    def seconds_per_step(self) -> float | None:
        """Pace of recent steps, including validation; None before the second step."""
        return pace([self._times[step] for step in sorted(self._times)[-RECENT:]])


def pace(times: Sequence[float]) -> float | None:
    """Return the mean seconds per step, excluding pauses."""
    gaps = [after - before for before, after in itertools.pairwise(times)]
    if not gaps:
        return None
    limit = PAUSE * statistics.median(gaps)
    return statistics.fmean([seconds for seconds in gaps if seconds <= limit] or gaps)
