"""Names of a run's checkpoints. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"


def checkpoint_names(output_dir: Path) -> list[str]:
    """Return the complete checkpoints, the oldest first."""
    names = (path.name for path in (output_dir / CHECKPOINTS).glob("step-*"))
    return sorted(name for name in names if re.fullmatch(r"step-\d{1,18}", name, re.ASCII))
