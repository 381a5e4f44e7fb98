"""Write the metrics of the training loop to ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.tracking.metrics_log import MetricsLog
from trainer.tracking.process_client import TrackingClient
from trainer.training.callbacks import Callback, Metrics, StepReport


class MetricsCallback(Callback):
    """Logs all metrics, and warns about a full disk and about problems of the sender.

    If the disk is full, metrics are lost and training continues.
    """

    def __init__(
        self, log: MetricsLog, client: TrackingClient, warn: Callable[[str], None]
    ) -> None:
        self._log, self._client, self._warn = log, client, warn
        self._is_full = False

    def on_step_end(self, report: StepReport) -> None:
        self._write(report.metrics)
        if problem := self._client.new_problem():
            self._warn(problem)

    def on_validation_end(self, metrics: Sequence[Metrics]) -> None:
        self._write(metrics)

    def _write(self, metrics: Sequence[Metrics]) -> None:
        for line in metrics:
            try:
                self._log.log(line.step, line.useful_tokens, line.values, line.prompt)
                self._is_full = False
            except OSError as error:
                if not self._is_full:
                    what = f"metrics not written to {self._log.path}: {error}"
                    self._warn(f"step {line.step}: {what}; training continues")
                self._is_full = True
