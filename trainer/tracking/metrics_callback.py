"""Writes the metrics of the training loop to ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.tracking.metrics_log import MetricsLog, unless_full
from trainer.tracking.process_client import TrackingClient
from trainer.training.callbacks import Callback, Metrics, StepReport


class MetricsCallback(Callback):
    """Logs every metric, and warns about problems of the process that sends them to MLflow."""

    def __init__(
        self, log: MetricsLog, client: TrackingClient, warn: Callable[[str], None]
    ) -> None:
        self._write, self._client, self._warn = unless_full(log, warn), client, warn

    def on_step_end(self, report: StepReport) -> None:
        self._log(report.metrics)
        if problem := self._client.new_problem():
            self._warn(problem)

    def on_validation_end(self, metrics: Sequence[Metrics]) -> None:
        self._log(metrics)

    def _log(self, metrics: Sequence[Metrics]) -> None:
        for line in metrics:
            self._write(line.step, line.useful_tokens, line.values, line.prompt)
