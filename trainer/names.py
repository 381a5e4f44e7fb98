"""Where a run's checkpoints lie, also for those who load no torch."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = "checkpoints"


def checkpoint_names(output_dir: Path) -> list[str]:
    """Of those that were written to their end, the oldest first."""
    return sorted(path.name for path in (output_dir / CHECKPOINTS).glob("step-*"))
