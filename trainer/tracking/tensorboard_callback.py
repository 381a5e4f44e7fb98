"""Write the metrics of a run for TensorBoard."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.runtime.errors import BadInput
from trainer.tracking.metrics_log import METRICS_FILE, read_lines
from trainer.training.callbacks import Callback, Metrics, StepReport
from trainer.training.progress import TrainingProgress

FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """Check that the optional package is installed; raise ``BadInput`` if it is not."""
    if importlib.util.find_spec("tensorboard") is None:
        raise BadInput(
            "tracking.tensorboard: true needs the package tensorboard, which is not installed; run "
            "`pip install tensorboard`, or set it to false"
        )


class TensorBoardCallback(Callback):
    """Writes each prompt's metrics to ``tensorboard/PROMPT``, those of the run to ``tensorboard``.

    TensorBoard then shows all prompts in one chart. At the start, the points in ``metrics.jsonl``
    are written again; a resumed run has removed later steps from that file.

    Args:
        make_writer: ``torch.utils.tensorboard.SummaryWriter``; this package imports no torch.
    """

    def __init__(
        self, output: Path, make_writer: Callable[[str], Any], warn: Callable[[str], None]
    ) -> None:
        self._output, self._make_writer, self._warn = output, make_writer, warn
        self._writers: dict[str | None, Any] = {}
        self._failed = False

    def on_run_start(self, progress: TrainingProgress) -> None:
        shutil.rmtree(self._output / FOLDER, ignore_errors=True)
        for line, _ in read_lines(self._output / METRICS_FILE):
            if line is not None:
                tokens = line.useful_tokens or 0
                self._add(Metrics(line.step, tokens, line.metrics, line.prompt), line.time)

    def on_step_end(self, report: StepReport) -> None:
        self.on_validation_end(report.metrics)

    def on_validation_end(self, metrics: Sequence[Metrics]) -> None:
        for line in metrics:
            self._add(line)

    def on_run_end(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _add(self, line: Metrics, time: float | None = None) -> None:
        """Add points; after the first ``OSError`` no more points are written."""
        if self._failed:
            return
        try:
            if line.prompt not in self._writers:
                folder = self._output / FOLDER / (line.prompt or "")
                self._writers[line.prompt] = self._make_writer(str(folder))
            for name, value in line.values.items():
                self._writers[line.prompt].add_scalar(name, value, line.step, time)
        except OSError as error:
            self._failed = True
            self._warn(f"{self._output / FOLDER}: no more points are written: {error}")
