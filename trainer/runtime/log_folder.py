"""Folders for the logs and results of commands that read a finished run.

The run may belong to another user, or be on a file system that is mounted read-only. Ranks and
launcher get the same folders.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from trainer.runtime.cache_dir import cache_dir


def inference_logs(run_dir: Path) -> Path:
    """Return ``logs`` of a run, or a folder of the cache if this user cannot write there."""
    logs = run_dir / "logs"
    paths = [logs, *logs.glob("*.log")] if logs.is_dir() else [run_dir]
    if all(os.access(path, os.W_OK) for path in paths):
        return logs
    return _in_cache("logs", run_dir)


def measurements_folder(run_dir: Path) -> Path:
    """Return the folder of a run, or a folder of the cache if this user cannot write there.

    ``promptshard evaluate`` and ``inspect`` write their results and logs into it.
    """
    return run_dir if os.access(run_dir, os.W_OK | os.X_OK) else _in_cache("measurements", run_dir)


def _in_cache(kind: str, run_dir: Path) -> Path:
    path = run_dir.resolve()
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return cache_dir(kind) / f"{path.name}-{key}"
