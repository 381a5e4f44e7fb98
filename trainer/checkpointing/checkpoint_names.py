"""List a run's checkpoints by name. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"


def checkpoint_names(output_dir: Path) -> list[str]:
    """Return the names of the complete checkpoints, oldest first."""
    names = (path.name for path in (output_dir / CHECKPOINTS).glob("step-*"))
    return sorted(name for name in names if re.fullmatch(r"step-\d{1,18}", name, re.ASCII))


def newest_checkpoint(output_dir: Path) -> str | None:
    """Return the name of the newest complete checkpoint, or None."""
    return next(reversed(checkpoint_names(output_dir)), None)
