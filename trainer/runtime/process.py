"""Process utilities: end with the parent, check whether a PID is alive.

Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: Environment variable with the path of a file that rank 0 removes once its work is done. Without
#: that, exit code 0 does not count: some other program may have run in place of ours.
UNFINISHED = "PROMPTSHARD_UNFINISHED"
#: Environment variable that is set where notes about the rows have been printed already.
ROWS_CHECKED = "PROMPTSHARD_ROWS_CHECKED"
#: When a process started, where that is unknown.
UNKNOWN = "unknown"


def die_with_parent(ending: signal.Signals = signal.SIGTERM, parent: int = 0) -> None:
    """Have Linux send this process a signal when its parent dies, however the parent dies.

    Args:
        parent: PID of the parent, which may have died already; 0 for the present one.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, ending)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), ending)


def mark_finished() -> None:
    """Tell the program that started the ranks that rank 0 has done its work."""
    path = os.environ.pop(UNFINISHED, None)
    if path is not None:
        Path(path).unlink(missing_ok=True)


def leave(code: int) -> NoReturn:
    """End at once, with everything flushed: threads of libraries may not outlive the run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def process_start(pid: int) -> str:
    """When a process of this host started; empty if it is gone, or is one no more (a zombie)."""
    stat = read_text(f"/proc/{pid}/stat")
    if stat:
        # The name, in brackets, may hold anything; what follows is state (3rd) to start (22nd).
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass  # somebody else's
    return UNKNOWN


def age() -> float:
    """Seconds since this process started; 0 where that is unknown."""
    try:
        started = int(process_start(os.getpid())) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float(read_text("/proc/uptime").split()[0]) - started)
    except (ValueError, IndexError):
        return 0.0


def ended_by(pid: int) -> int:
    """The signal that has ended a process whose parent has not asked yet; 0 if none, or unknown."""
    # The last field is what wait() will give: see proc(5).
    fields = read_text(f"/proc/{pid}/stat").split()
    return int(fields[-1]) & 0x7F if fields else 0


def read_text(path: str) -> str:
    """Of a file of the kernel's; empty where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
