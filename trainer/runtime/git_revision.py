"""Look up the git revision of the running code. Standard library only."""

from __future__ import annotations

import subprocess
from pathlib import Path

#: File with the revision in the copy of the code that a submitted job runs.
REVISION_FILE = "REVISION"


def git_revision(root: Path) -> str | None:
    """Return the commit of ``root``, plus ``+changed`` if files differ; None outside a clone."""
    frozen = root / REVISION_FILE
    if frozen.is_file():
        return frozen.read_text(encoding="utf-8").strip() or None
    try:
        top, revision, changes = (
            subprocess.run(
                ["git", "-C", str(root), *what],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for what in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "-uno"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if Path(top).resolve() != root.resolve():  # installed inside a clone of something else
        return None
    return revision + ("+changed" if changes else "")
