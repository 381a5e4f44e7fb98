"""Run the DeepSpeed launcher: its output to a log, signals to the ranks, no orphans.

Facts about the launcher (0.19.8) that this file relies on: its per-node part turns a signal into
exit code 1 and hides the ranks' own codes, so signals go to the ranks and not to it; and as Slurm
sends a signal to every process of a job's step, it is started with stop signals blocked, which the
ranks unblock once they can handle them. Exit code 0 counts only if rank 0 has removed a file: some
other program may have run in place of ours.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launch import guard, messages
from launch.endings import ExitReport, describe
from trainer.distributed.watchdog import LOST, read_lost
from trainer.runtime import bootstrap
from trainer.runtime.errors import (
    BadInput,
)
from trainer.runtime.process import UNFINISHED, ended_by, process_start
from trainer.runtime.stdio import VARIABLE as STDOUT_FD_VARIABLE

GRACE_SECONDS = guard.GRACE_SECONDS  # between asking a rank to end and ending it
STOP_SECONDS = 600.0  # the same where it may end its step first, and save
LOSS_SECONDS = 15.0  # the same where another rank has failed: it may wait for that one
HURRY_SECONDS = 10.0  # a second Ctrl-C before that is taken for the same
TRAINER = "trainer"  # the one module whose runs can be resumed
NOTICE_SECONDS = 4.0  # between two lines that say that the ranks are starting
POLL_SECONDS = 0.1
REAL_STDOUT = 1  # as a descriptor, whatever sys.stdout has been replaced with
SPAWNED = re.compile(r"process (\d+) spawned with command")
ENDING_OTHERS = "Killing subprocess"  # the launcher says so once a rank has failed
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class _Losses:
    """Which rank of this machine was lost first, while the launcher does not look.

    The launcher tells its processes in the order of their ranks, and one exit code alone. Of ranks
    that ended at a time, one that a signal has ended took the others down.
    When one has failed it asks the others to end and waits for each, up to half a minute: ranks
    that hear nothing, as they are stopped or wait for the lost one, are ended before.
    """

    def __init__(self, log: Path, ranks: int, first_rank: int, end: Callable[[], None]) -> None:
        self._log, self._ranks, self._first_rank, self._end = log, ranks, first_rank, end
        self._pids: list[int] = []
        self._deadline: float | None = None
        #: In the order in which they ended: process, how it is called, and what signal ended it.
        self._ended: dict[int, tuple[str, int]] = {}

    @property
    def first(self) -> tuple[str, int]:
        """The first that did not end well, and the signal that ended it, or 0; "" if none did."""
        log = self._log.read_text(errors="replace")
        lost = [who for pid, who in self._ended.items() if f"Process {pid} exits succ" not in log]
        return lost[0] if lost else ("", 0)

    def look(self) -> None:
        if self._ended:
            self._hasten()
        if len(self._pids) < self._ranks:
            found = SPAWNED.findall(self._log.read_text(errors="replace"))
            self._pids = [int(pid) for pid in found]
            return
        ended = [pid for pid in self._pids if pid not in self._ended and not process_start(pid)]
        signals = {pid: ended_by(pid) for pid in ended}
        for pid in sorted(ended, key=lambda pid: not signals[pid]):
            rank = self._first_rank + self._pids.index(pid)
            self._ended[pid] = (f"rank {rank} (process {pid} on {platform.node()})", signals[pid])

    def _hasten(self) -> None:
        """End what is left once a rank has failed a while ago; one that is done is no failure."""
        if self._deadline is None:
            if ENDING_OTHERS in self._log.read_text(errors="replace"):
                self._deadline = time.monotonic() + LOSS_SECONDS
        elif time.monotonic() > self._deadline:
            self._end()


class _StartNotice:
    """Tells a person every few seconds that the ranks are starting, until rank 0 can print.

    Args:
        rank_log: rank 0's log; ``trainer.runtime.stdio.claim`` sets its time.
    """

    def __init__(self, rank_log: Path) -> None:
        self._log, self._started_at = rank_log, time.time()
        self._notices = 0

    def look(self) -> None:
        seconds = time.time() - self._started_at
        if seconds < NOTICE_SECONDS * (self._notices + 1):
            return
        self._notices += 1
        with suppress(OSError):
            if self._log.stat().st_mtime >= self._started_at:
                self._notices = sys.maxsize
                return
        messages.note(f"importing deepspeed and starting the ranks: {seconds:.0f} s")


class StopSignals:
    """Stop signals that this process received."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect stop signals, but leave those ignored that nohup or a shell's & ignores."""
        before: dict[signal.Signals, Any] = {}
        for number in STOPPING:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not ignored or number not in (signal.SIGHUP, signal.SIGINT):
                before[number] = signal.signal(number, self)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_local(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    module: str,
    ranks: int,
    grace_seconds: float = STOP_SECONDS,
    first_rank: int = 0,
) -> ExitReport:
    """Run the launcher on this machine and hand on how its ranks ended.

    Rank 0 gets our stdout as descriptor 0 (trainer/runtime/stdio.py); stderr is shared, for errors
    that come before a rank has opened its log.

    Args:
        grace_seconds: between a stop signal and the end of ranks that do not stop.
        first_rank: of this machine, among all of the run.
    """
    (log.parent / LOST).unlink(missing_ok=True)
    unfinished = log.absolute().with_suffix(".unfinished")
    environment = {**environment, STDOUT_FD_VARIABLE: "0"}
    if first_rank == 0:
        _touch(unfinished)
        environment[UNFINISHED] = str(unfinished)
    stop = StopSignals()
    with log.open("wb") as chatter, stop.listening():
        with _blocked(STOPPING):
            process = start(
                command,
                env=environment,
                stdin=REAL_STDOUT,
                stdout=chatter,
                start_new_session=True,  # a group of its own: the terminal's Ctrl-C reaches only us
            )
        with guarded(process.pid):
            forward = functools.partial(_signal_ranks, process.pid)
            end = functools.partial(_kill_ranks, process.pid)
            losses = _Losses(log, ranks, first_rank, end)
            notice = _StartNotice(log.parent / "rank-0.log")

            def look() -> None:
                losses.look()
                if first_rank == 0:
                    notice.look()

            wait(process, stop, forward, grace_seconds, look)
            _end_ranks(process.pid)
    lost = first_rank == 0 and unfinished.exists()
    unfinished.unlink(missing_ok=True)
    return describe(
        process.returncode,
        stop.signals,
        log,
        lost=lost,
        resumable=module == TRAINER,
        first=losses.first,
        hung=read_lost(log.parent),
    )


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise BadInput(f"output_dir: cannot write to {path.parent}: {error.strerror}") from None


def start(command: Sequence[str], **settings: Any) -> subprocess.Popen[Any]:
    """``Popen``.

    Raises:
        BadInput: the arguments are longer than the system takes.
    """
    try:
        return subprocess.Popen(command, **settings)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        raise BadInput(
            "the arguments of this command are too long for the system; write the settings into "
            "the run file"
        ) from None


def wait(
    process: subprocess.Popen[Any],
    stop: StopSignals,
    forward: Callable[[signal.Signals], None],
    grace_seconds: float = GRACE_SECONDS,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Wait for the launcher. A stop signal is forwarded; another Ctrl-C, or time, ends the group.

    That is one by a person who has waited: who types it twice at once wants what one does, and
    ranks that save are not disturbed. Other signals may come twice: Slurm sends SIGTERM after
    SIGUSR1.
    """
    deadline, patient, heard = None, float("inf"), 0
    while process.poll() is None:
        look()
        if stop.signals and deadline is None:
            deadline, patient = time.monotonic() + grace_seconds, time.monotonic() + HURRY_SECONDS
            forward(stop.signals[0])
        interrupts = stop.signals.count(signal.SIGINT)
        if time.monotonic() < patient:
            heard = interrupts
        hurried = interrupts > heard
        if deadline is not None and (hurried or time.monotonic() > deadline):
            signal_group(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _signal_ranks(group: int, number: signal.Signals) -> None:
    """Send SIGINT or SIGTERM to the ranks; without a rank there is nothing to save: kill all."""
    ranks = _running(group)
    if not ranks:
        signal_group(group, signal.SIGKILL)
    for rank in ranks:
        _try_signal(rank, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _end_ranks(group: int) -> None:
    """End ranks that outlived the launcher, but no other process that they left running."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in _running(group):
        _try_signal(process, signal.SIGTERM)
    while left := _running(group):
        if time.monotonic() > deadline:
            for process in left:
                _try_signal(process, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _kill_ranks(group: int) -> None:
    for process in _running(group):
        _try_signal(process, signal.SIGKILL)


def _running(group: int) -> list[psutil.Process]:
    """Return the ranks in the process group, without their own worker processes."""
    found = {}
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) != group or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.cmdline()[1:3] == ["-u", bootstrap.FILE]:  # as the launcher starts them
                found[process.pid] = (process, process.ppid())
        except (psutil.Error, OSError):
            continue
    return [process for process, parent in found.values() if parent not in found]


def signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _try_signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Processes that are started in here begin with these signals blocked; one sent stays there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def guarded(group: int) -> Iterator[None]:
    """Have ``launch/guard.py`` end the group if this process dies in here."""
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-E", guard.__file__, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.communicate(guard.DONE)
