"""Process utilities: end with the parent, exit at once, look up a PID. Standard library only."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: Environment variable with the path of a file that rank 0 deletes when its work is done. If the
#: file still exists, exit code 0 is ignored: another program may have run instead.
UNFINISHED = "PROMPTSHARD_UNFINISHED"
#: Environment variable that is set if the remarks about the rows were already printed.
ROWS_CHECKED = "PROMPTSHARD_ROWS_CHECKED"
#: Environment variable with the time (seconds since the epoch) at which the command was started.
STARTED = "PROMPTSHARD_STARTED"
#: Environment variable with the options of ``promptshard train`` that started the ranks and that a
#: resume repeats, such as ``--hostfile hosts``.
START_OPTIONS = "PROMPTSHARD_START_OPTIONS"
#: Libraries that torch and transformers (5.0 to 5.24) import if installed, for parts that are not
#: used here: losses of image models, assisted generation, pickles of lambdas, loading to several
#: devices, kernels of a hub. scikit-learn imports scipy, so both must be hidden. With ``kernels``,
#: functions of transformers become modules, which ``fused_ops`` does not recognize.
UNUSED = ("scipy", "sklearn", "dill", "accelerate", "kernels")
#: Environment of processes that compute on the CPU: threads sleep while they wait for each other.
#: By default they spin, which takes the cores of the thread that they wait for if others use them.
WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
#: Result of ``process_start`` if the process exists but has no readable start time.
UNKNOWN = "unknown"


def die_with_parent(ending: signal.Signals = signal.SIGTERM, parent: int = 0) -> None:
    """Have Linux send this process a signal when its parent dies for any reason.

    Args:
        parent: PID of the parent, which may have died already; 0: the current parent.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, ending)
    if os.getppid() != parent:  # the parent died before the call of prctl
        os.kill(os.getpid(), ending)


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import torch, transformers and deepspeed without what is not needed of them.

    Garbage collection is off: Python would search all objects of the imported modules again and
    again; they stay excluded. ``UNUSED`` libraries are hidden.
    """
    gc.disable()
    try:
        with hidden(*UNUSED):
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def hidden(*libraries: str) -> Iterator[None]:
    """Make libraries appear not to be installed, unless they are already imported."""
    blocked = [name for name in libraries if name not in sys.modules]
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]


def mark_finished() -> None:
    """Delete the file of ``UNFINISHED``: rank 0 has done its work."""
    path = os.environ.pop(UNFINISHED, None)
    if path is not None:
        Path(path).unlink(missing_ok=True)


def rerun() -> str:
    """Return ``Rerun the command``, without the option that would start over."""
    return "Rerun the command" + (" without --fresh" if "--fresh" in sys.argv[1:] else "")


def flush_and_exit(code: int) -> NoReturn:
    """Flush the standard streams and exit without waiting for library threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def process_start(pid: int) -> str:
    """Return the start time of a process of this host, in clock ticks since boot, as text.

    Empty if there is no such process or it is a zombie; ``UNKNOWN`` without /proc.
    """
    stat = read_text(f"/proc/{pid}/stat")
    if stat:
        # Fields 3 (state) to 22 (start) follow "(NAME)", which can contain any character.
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass  # the process of another user
    return UNKNOWN


def process_age() -> float:
    """Return the seconds since this process started; 0 if unknown."""
    try:
        started = int(process_start(os.getpid())) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float(read_text("/proc/uptime").split()[0]) - started)
    except (ValueError, IndexError):
        return 0.0


def seconds_since_start() -> float:
    """Return the seconds since the command was started, or since this process was, if unknown."""
    try:
        return max(0.0, time.time() - float(os.environ[STARTED]))
    except (KeyError, ValueError):
        return process_age()


def ending_signal(pid: int) -> int:
    """Return the signal that killed a zombie process; 0 if none or unknown."""
    # The last field is the exit status as wait() returns it: see proc(5).
    fields = read_text(f"/proc/{pid}/stat").split()
    return int(fields[-1]) & 0x7F if fields else 0


def read_text(path: str) -> str:
    """Read a file of /proc or /sys; empty if it does not exist."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
