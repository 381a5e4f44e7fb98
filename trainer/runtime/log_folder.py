"""Folder for the logs of commands that read a finished run, such as ``promptshard generate``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from trainer.runtime.cache_dir import cache_dir


def inference_logs(run_dir: Path) -> Path:
    """Return ``logs`` of a run, or a folder of the cache if this user cannot write there.

    The run may belong to another user, or be on a file system that is mounted read-only. Ranks and
    launcher get the same folder.
    """
    logs = run_dir / "logs"
    paths = [logs, *logs.glob("*.log")] if logs.is_dir() else [run_dir]
    if all(os.access(path, os.W_OK) for path in paths):
        return logs
    path = run_dir.resolve()
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return cache_dir("logs") / f"{path.name}-{key}"
