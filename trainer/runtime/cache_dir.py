"""Location of the cache directory.

``$PROMPTSHARD_CACHE``, else ``$XDG_CACHE_HOME/promptshard``, else ``~/.cache/promptshard``.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(kind: str) -> Path:
    """Return the folder of one kind of data, such as ``tokens``; it may not exist yet."""
    own = os.environ.get("PROMPTSHARD_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.expanduser(own or f"{shared}/promptshard")
    # Without a home directory, nothing is cached: nothing can be created below /dev/null.
    return Path(os.devnull if folder.startswith("~") else folder) / kind
