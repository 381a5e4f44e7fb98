"""``metrics.jsonl``: all metrics of a run, one JSON object per line.

    {"time": 1763.. s, "step": 50, "useful_tokens": 409600, "prompt": "triage",
     "metrics": {"train_loss": 0.71, "learning_rate": 0.003}}

``prompt`` is null for metrics of the run. A number that is not finite is null, and read as NaN.
Earlier versions wrote the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.runtime import atomic_io

METRICS_FILE = "metrics.jsonl"
VALIDATION = ("validation", "shifted_validation")
SYSTEM_FILE = "logs/system_metrics.jsonl"
#: Upper bound of the length of a line, in bytes.
MAX_LINE = 1 << 20
#: The largest integer that JSON and databases hold exactly; a line with a larger one is damaged.
MAX_COUNT = 2**53
#: Beginning of a line that ``MetricsLog`` has written.
_BEGIN = re.compile(rb'\{"time": [0-9.]+, "step": (\d+), ')


@dataclass(frozen=True)
class Line:
    """One line of ``metrics.jsonl``."""

    time: float
    step: int
    useful_tokens: int | None
    prompt: str | None
    metrics: dict[str, float]

    @property
    def is_validation(self) -> bool:
        return any(name.startswith(VALIDATION) for name in self.metrics)


class MetricsLog:
    """Appends to ``metrics.jsonl``. A metric's steps must not decrease, except after ``rewind``."""

    def __init__(self, output_dir: Path | str, name: str = METRICS_FILE) -> None:
        self.path = Path(output_dir) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file: BinaryIO = self._open()

    def log(
        self,
        step: int,
        useful_tokens: int | None,
        metrics: Mapping[str, float],
        prompt: str | None = None,
    ) -> None:
        """Append one line and flush it to the operating system, without fsync."""
        line = {
            "time": round(time.time(), 3),
            "step": int(step),
            "useful_tokens": None if useful_tokens is None else int(useful_tokens),
            "prompt": prompt,
            "metrics": {name: _encode(value) for name, value in metrics.items()},
        }
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def rewind(self, step: int, *, validated: bool = True) -> None:
        """Drop lines after ``step``, which a resumed run repeats. Call it before the sender starts.

        ``validated`` is False if the validation of ``step`` itself is repeated too.
        """
        self._file.close()
        with atomic_io.replacing(self.path, durable=True) as out:
            for raw, _ in _complete_lines(self.path):
                # Parsing all lines of a long run would delay its start by minutes.
                begin = _BEGIN.match(raw)
                if begin is not None and int(begin[1]) < step:
                    out.write(raw)
                    continue
                line = _parse(raw)
                if line is None or line.step > step:
                    continue
                if validated or line.step < step or not line.is_validation:
                    out.write(raw)
        self._file = self._open()

    def restore(self) -> bool:
        """Rewrite the file with all its lines if it was deleted or moved; return whether it was.

        The content of a deleted file exists as long as this process has it open.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                return False
        self._file.flush()
        self._file.seek(0)
        with atomic_io.replacing(self.path, durable=True) as out:
            shutil.copyfileobj(self._file, out)
        self._file.close()
        self._file = self._open()
        return True

    def _open(self) -> BinaryIO:
        return self.path.open("ab+")

    def close(self) -> None:
        self._file.close()


def read_lines(
    path: Path, offset: int = 0, *, containing: bytes = b""
) -> Iterator[tuple[Line | None, int]]:
    """Yield complete lines from byte ``offset``, each with its end; None for a damaged line.

    Yields nothing for a missing file.

    Args:
        containing: skip lines without these bytes; much faster than parsing them.
    """
    for raw, end in _complete_lines(path, offset):
        if containing in raw:
            yield _parse(raw), end


def _complete_lines(path: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield the bytes of complete lines, each with its end; nothing for a missing file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return  # still being written
            offset += len(raw)
            yield raw, offset


def _parse(raw: bytes) -> Line | None:
    try:
        data = json.loads(raw)
        tokens, prompt = data.get("useful_tokens"), data.get("prompt")
        line = Line(
            time=float(data["time"]),
            step=int(data["step"]),
            useful_tokens=None if tokens is None else int(tokens),
            prompt=prompt,
            metrics={
                str(k): math.nan if v is None else float(v) for k, v in data["metrics"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    counts = (line.time, line.step, line.useful_tokens or 0)
    possible = all(0 <= count < MAX_COUNT for count in counts)  # false for NaN
    return line if possible and isinstance(prompt, str | None) else None


def _encode(value: float) -> float | int | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(value) if number.is_integer() and isinstance(value, int) else number


def _cut_torn_line(path: Path) -> None:
    """Cut an incomplete last line, which a crash can leave."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - MAX_LINE)
        file.seek(start)
        line_end = start + file.read(end - start).rfind(b"\n") + 1
        if line_end < end:
            file.truncate(line_end)
