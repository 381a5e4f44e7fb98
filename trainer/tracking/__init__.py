"""Metrics to a file first, to MLflow from there, in a process of its own.

    loop -> MetricsLog -> OUTPUT_DIR/metrics.jsonl -> sidecar -> MLflow

The trainer only ever appends to a local file. A sidecar process reads it and talks to the tracker,
so a tracker that is down, slow or hanging cannot slow a step. What was not sent stays in the file;
``sync`` sends it later. This package is the only importer of mlflow, and imports no torch.
"""

from __future__ import annotations

from trainer.tracking.metrics_log import MetricsLog, unless_full
from trainer.tracking.process_client import Finished, TrackingClient
from trainer.tracking.pusher import SyncResult, sync

__all__ = ["Finished", "MetricsLog", "SyncResult", "TrackingClient", "sync", "unless_full"]
