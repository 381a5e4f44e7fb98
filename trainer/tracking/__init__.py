"""Metrics go to a local file first; a background process sends them to MLflow.

    training loop -> MetricsLog -> OUTPUT_DIR/metrics.jsonl -> sender process -> MLflow

1. ``metrics_callback``: at every step and validation, the training process appends a ``Line`` to
   ``metrics.jsonl`` (``metrics_log``). ``tensorboard_callback`` writes TensorBoard files.
2. ``process_client``: ``TrackingClient`` starts the sender and reports its problems. Training steps
   never wait for the sender, so a tracker that is down or slow cannot delay them.
3. ``sender_process``: sends in rounds and ends with the trainer.
4. ``store_uri``: ``resolve`` chooses the store (``StoreAddress``) and hides its credentials;
   ``sqlite_store`` creates the default one.
5. ``run_files``, ``run_metadata``: convert the output folder to params, tags, datasets and
   ``Artifact`` files; ``tables``: results as tables that MLflow shows.
6. ``pusher``: ``Pusher`` compares the folder with ``tracking.json`` (``progress_file``) and sends
   the difference. ``sync`` does the same once, after the run.
7. ``mlflow_store``: ``MlflowStore`` writes runs. Only this package imports mlflow.
8. ``model_sender``: at the end, sends each prompt as a LoggedModel (``logged_models``) and, on
   request, registers it (``registry``) with files that MLflow loads (``model_files``).
9. ``refusals``: explains errors, and tells refusals from outages.

Imports no torch.
"""

from __future__ import annotations

from trainer.tracking.metrics_log import MetricsLog
from trainer.tracking.process_client import Finished, TrackingClient
from trainer.tracking.pusher import SyncResult, sync

__all__ = ["Finished", "MetricsLog", "SyncResult", "TrackingClient", "sync"]
