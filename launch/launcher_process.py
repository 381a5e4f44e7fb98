"""Run the launcher: log its output, forward signals to the ranks, leave no orphans.

The launcher turns a signal into exit code 1 and ends the ranks, so signals are sent to the ranks
and not to the launcher. Slurm sends a signal to every process of a
job step, so the launcher starts with stop signals blocked; the ranks unblock them when they have
handlers. Exit code 0 is a success only if rank 0 has removed a marker file, because another program
may have run instead of this one.
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

from launch import messages, orphan_guard, preflight
from launch.exit_report import REFUSED, VERDICT, ExitReport, describe
from launch.run_logs import last_error, rank_log
from trainer.checkpointing.run_lock import Holder
from trainer.distributed.watchdog import LOST, read_lost
from trainer.runtime import bootstrap, stop_signals
from trainer.runtime.errors import EXIT_BAD_INPUT, BadInput
from trainer.runtime.process import UNFINISHED, ending_signal, process_start
from trainer.runtime.stdio import VARIABLE as STDOUT_FD_VARIABLE

GRACE_SECONDS = orphan_guard.GRACE_SECONDS  # from SIGTERM to SIGKILL
STOP_SECONDS = 600.0  # the same, for ranks that finish their step and save a checkpoint first
LOSS_SECONDS = 15.0  # the same, for ranks that may be waiting for a failed rank
HURRY_SECONDS = 10.0  # a second Ctrl-C within this time is ignored
TRAINER = "trainer"  # the one module whose runs can be resumed
NOTICE_SECONDS = 4.0  # between two progress lines while the ranks start
POLL_SECONDS = 0.1
REAL_STDOUT = 1  # file descriptor, even if sys.stdout was replaced
SPAWNED = re.compile(r"process (\d+) spawned with command")
LOST_PEER = re.compile(r"Connection (?:closed|reset) by peer|Broken pipe")  # errors of gloo
ENDING_OTHERS = "Killing subprocess"  # logged by the launcher once a rank has failed
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class _FailureWatch:
    """Finds the rank of this machine that failed first, and ends the others.

    The launcher reports one exit code, but not of which rank. If several ranks end at the same
    time, one that was killed by a signal is reported as the first. After a failure the launcher
    sends SIGTERM to the other ranks and waits up to half a minute for each. This class kills ranks
    earlier that do not react because they are suspended or wait for the failed rank.
    """

    def __init__(self, log: Path, ranks: int, first_rank: int, kill: Callable[[], object]) -> None:
        self._log, self._ranks, self._first_rank, self._kill = log, ranks, first_rank, kill
        self._pids: list[int] = []
        self._deadline: float | None = None
        #: PID -> (name of the rank, signal that ended it), in the order in which they ended.
        self._ended: dict[int, tuple[str, int]] = {}

    @property
    def first(self) -> tuple[str, int]:
        """First rank that failed, and the signal that killed it or 0; ("", 0) if none failed."""
        log = self._log.read_text(errors="replace")
        failed = (rank for pid, rank in self._ended.items() if f"{pid} exits succ" not in log)
        return next(failed, ("", 0))

    def poll(self) -> None:
        """Record the ranks that have ended since the last call."""
        if self._ended:
            self._hasten()
        if len(self._pids) < self._ranks:
            spawned = SPAWNED.findall(self._log.read_text(errors="replace"))
            self._pids = [int(pid) for pid in spawned]
            return
        ended = [pid for pid in self._pids if pid not in self._ended and not process_start(pid)]
        signals = {pid: ending_signal(pid) for pid in ended}
        for pid in sorted(ended, key=lambda pid: not signals[pid]):
            rank = self._first_rank + self._pids.index(pid)
            self._ended[pid] = (_name(rank, pid), signals[pid])

    def _hasten(self) -> None:
        """Kill the remaining ranks some time after one has failed (not after one has finished)."""
        if self._deadline is None:
            if ENDING_OTHERS in self._log.read_text(errors="replace"):
                self._deadline = time.monotonic() + LOSS_SECONDS
        elif time.monotonic() > self._deadline:
            self._kill()


def _name(rank: int, pid: int) -> str:
    return f"rank {rank} (process {pid} on {platform.node()})"


class _StartNotice:
    """Prints every few seconds that the ranks are starting, until rank 0 can print.

    Rank 0 then updates the modification time of ``rank_log`` (``trainer.runtime.stdio.claim``).
    """

    def __init__(self, rank_log: Path) -> None:
        self._log, self._started_at = rank_log, time.time()
        self._notices = 0

    def poll(self) -> None:
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
    """Collects the stop signals that this process receives."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect stop signals; those that nohup or a shell's ``&`` ignores stay ignored."""
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
    """Run the launcher on this machine, or a single rank, and report how the ranks ended.

    Rank 0 receives this process's stdout as descriptor 0 (trainer/runtime/stdio.py). All ranks
    share stderr, for errors before a rank has opened its log.

    Args:
        grace_seconds: time after a stop signal until ranks that do not stop are killed.
        first_rank: global index of this machine's first rank.
    """
    for name in (LOST, stop_signals.FILE) if module == TRAINER else (LOST,):
        (log.parent / name).unlink(missing_ok=True)  # of an earlier start
    unfinished = log.absolute().with_suffix(".unfinished")
    environment = {**environment, STDOUT_FD_VARIABLE: "0"}
    if first_rank == 0:
        with preflight.writing(log.parent):
            unfinished.write_text(Holder.here().to_json())  # for `promptshard status`
        environment[UNFINISHED] = str(unfinished)
    stop = StopSignals()
    ends = {path: path.stat().st_size for path in log.parent.glob("rank-*.log")}
    with log.open("wb") as chatter, stop.listening():
        with _blocked(STOPPING):
            process = start(
                command,
                env=environment,
                stdin=REAL_STDOUT,
                stdout=chatter,
                start_new_session=True,  # the terminal's Ctrl-C reaches only this process
            )
        with guarded(process.pid):
            forward = functools.partial(_forward, process.pid)
            kill = functools.partial(_signal_ranks, process.pid, signal.SIGKILL)
            failures = _FailureWatch(log, ranks, first_rank, kill)
            notice = _StartNotice(log.parent / "rank-0.log")

            def poll() -> None:
                failures.poll()
                if first_rank == 0:
                    notice.poll()

            wait(process, stop, forward, grace_seconds, poll)
            _end_ranks(process.pid)
    rank_0_unfinished = first_rank == 0 and unfinished.exists()
    unfinished.unlink(missing_ok=True)
    first = failures.first
    if _is_rank(command):
        first = (_name(first_rank, process.pid), max(0, -process.returncode))
    report = describe(
        process.returncode,
        stop.signals,
        log,
        lost=rank_0_unfinished,
        resumable=module == TRAINER,
        first=first,
        hung=read_lost(log.parent),
        error=_unprinted_error(first, log.parent, ends),
    )
    _record(report, log)
    return report


def _unprinted_error(first: tuple[str, int], logs: Path, ends: Mapping[Path, int]) -> str:
    """Return the error of the rank that failed first; only rank 0 has printed its own.

    Args:
        ends: sizes of the logs before the ranks started.
    """
    name, killed_by = first
    log = rank_log(logs, name)
    if log is None or killed_by or name.startswith("rank 0 "):
        return ""
    error = last_error(log, ends.get(log, 0))
    return "" if LOST_PEER.search(error) else error


def _record(report: ExitReport, log: Path) -> None:
    """Append to the launcher's log how the processes ended, for ``promptshard status``."""
    if ending := report.message or (REFUSED if report.code == EXIT_BAD_INPUT else ""):
        with suppress(OSError), log.open("a") as file:  # a full disk
            file.write(f"{VERDICT}{ending}\n")


def start(command: Sequence[str], **settings: Any) -> subprocess.Popen[Any]:
    """Start a process.

    Raises:
        BadInput: the arguments are longer than the system allows.
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
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Wait for the launcher and forward the first stop signal to the ranks.

    The group is killed after ``grace_seconds``, or by another Ctrl-C at least ``HURRY_SECONDS``
    after the first: an accidental double Ctrl-C must not interrupt ranks that save. Other signals
    may repeat without effect (Slurm sends SIGTERM after SIGUSR1).
    """
    deadline, ignored_until, ignored = None, float("inf"), 0
    while process.poll() is None:
        poll()
        if stop.signals and deadline is None:
            now = time.monotonic()
            deadline, ignored_until = now + grace_seconds, now + HURRY_SECONDS
            forward(stop.signals[0])
        interrupts = stop.signals.count(signal.SIGINT)
        if time.monotonic() < ignored_until:
            ignored = interrupts
        hurried = interrupts > ignored
        if deadline is not None and (hurried or time.monotonic() > deadline):
            signal_group(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _forward(group: int, number: signal.Signals) -> None:
    if not _signal_ranks(group, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM):
        signal_group(group, signal.SIGKILL)


def _end_ranks(group: int) -> None:
    """End ranks that outlived the launcher, but not other processes that they started."""
    deadline = time.monotonic() + GRACE_SECONDS
    _signal_ranks(group, signal.SIGTERM)
    while _ranks(group):
        if time.monotonic() > deadline:
            _signal_ranks(group, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _signal_ranks(group: int, number: signal.Signals) -> bool:
    ranks = _ranks(group)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    return bool(ranks)


def _ranks(group: int) -> list[psutil.Process]:
    """Return the ranks in the process group, without their own worker processes."""
    ranks = {}
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) != group or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if _is_rank(process.cmdline()):
                ranks[process.pid] = (process, process.ppid())
        except (psutil.Error, OSError):
            continue
    return [process for process, parent in ranks.values() if parent not in ranks]


def _is_rank(command: Sequence[str]) -> bool:
    """Whether a command line is that of a rank, as the launcher starts them."""
    return [*command[1:3]] == ["-u", bootstrap.FILE]


def signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Block signals for processes started inside; a blocked signal stays pending."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def guarded(group: int) -> Iterator[None]:
    """Let ``launch/orphan_guard.py`` end the group if this process dies in the ``with`` block."""
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-E", orphan_guard.__file__, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.communicate(orphan_guard.DONE)
