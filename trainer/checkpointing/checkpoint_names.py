"""Names of a run's checkpoints. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"


def checkpoint_names(output_dir: Path) -> list[str]:
    """Return the complete checkpoints, the oldest first."""
    names = (path.name for path in (output_dir / CHECKPOINTS).glob("step-*"))
    return sorted(name for name in names if re.fullmatch(r"step-\d{1,18}", name, re.ASCII))


def newest_checkpoint(output_dir: Path) -> str | None:
    """Return the newest complete checkpoint; None if there is none."""
    return next(reversed(checkpoint_names(output_dir)), None)
