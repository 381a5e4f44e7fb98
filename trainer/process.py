"""What this process owes its parent, and what it need not load. Standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies, so that a killed launcher leaves no orphans."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """End at once, with everything flushed: threads of libraries may not outlive the run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def left_out(library: str) -> Iterator[None]:
    """Inside, a library that is not loaded yet cannot be imported, as if it were not installed."""
    if library in sys.modules:
        yield
        return
    sys.modules[library] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[library]
