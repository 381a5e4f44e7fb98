"""Run the DeepSpeed launcher: its chatter to a log, signals to the ranks, nobody left behind.

Three facts about the launcher (0.19.8) shape this file. Its runner has no signal handlers, so a
signal ends it and orphans the ranks. Its per-node part turns a signal into exit code 1 and hides
the ranks' own codes, so signals go to the ranks and not to it; and as Slurm sends a signal to every
process of a job's step, both are started with stop signals blocked, which the ranks let through
again once they can handle them. And the runner answers 0 when the per-node part was killed, so
success is read from the log.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from launch import guard
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, EXIT_RESUMABLE
from trainer.process import ended_by, process_start
from trainer.terminal import VARIABLE as STDOUT_FD_VARIABLE
from trainer.watchdog import LOST, read_lost

GRACE_SECONDS = guard.GRACE_SECONDS  # between asking a rank to end and ending it
STOP_SECONDS = 600.0  # the same where it may end its step first, and save
LOSS_SECONDS = 15.0  # the same where another rank has failed: it may wait for that one
HURRY_SECONDS = 10.0  # a second Ctrl-C before that is taken for the same
TRAINER = "trainer"  # the one module whose runs can go on
PER_NODE_MODULE = "deepspeed.launcher.launch"  # what the runner starts, and what starts the ranks
REMOTE_GRACE_SECONDS = 30.0  # the launcher ends ranks on other hosts over ssh
POLL_SECONDS = 0.1
REAL_STDOUT = 1  # as a descriptor, whatever sys.stdout has been replaced with
CHATTER = re.compile(r"^(\S+: )?\[\d{4}-\d\d-\d\d [\d:,]+\] \[[A-Z]+\] \[")
SPAWNED = re.compile(r"process (\d+) spawned with command")
ENDING_OTHERS = "Killing subprocess"  # the launcher says so once a rank has failed
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Ending:
    """Our exit code, and what to tell the person if rank 0 has not told it."""

    code: int
    message: str = ""


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


class _Stop:
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
) -> Ending:
    """Run the launcher on this machine and hand on how its ranks ended.

    Rank 0 finds our stdout at its descriptor 0 (trainer/terminal.py); stderr is shared, for what
    goes wrong before a rank has opened its log.

    Args:
        grace_seconds: between a stop signal and the end of ranks that do not stop.
        first_rank: of this machine, among all of the run.
    """
    (log.parent / LOST).unlink(missing_ok=True)
    stop = _Stop()
    with log.open("wb") as chatter, stop.listening():
        with _blocked(STOPPING):
            process = subprocess.Popen(
                command,
                env={**environment, STDOUT_FD_VARIABLE: "0"},
                stdin=REAL_STDOUT,
                stdout=chatter,
                start_new_session=True,  # a group of its own: the terminal's Ctrl-C reaches only us
            )
        with _guarded(process.pid):
            forward = functools.partial(_signal_ranks, process.pid, module)
            end = functools.partial(_kill_ranks, process.pid, module)
            losses = _Losses(log, ranks, first_rank, end)
            _wait(process, stop, forward, grace_seconds, losses.look)
            _end_ranks(process.pid, module)
    finished = len(re.findall("exits successfully", log.read_text(errors="replace")))
    return _ending(
        process.returncode,
        stop.signals,
        log,
        lost=finished < ranks,
        resumable=module == TRAINER,
        first=losses.first,
        hung=read_lost(log.parent),
    )


def run_remote(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Ending:
    """Run the launcher over several hosts; its chatter is told from rank 0's lines by its form."""
    stop = _Stop()
    with log.open("w") as chatter, stop.listening():
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        sorter = threading.Thread(target=_sort_lines, args=(process.stdout, chatter, sys.stdout))
        sorter.start()
        with _guarded(process.pid):
            # the runner's own handler ends the ranks of all hosts
            _wait(process, stop, lambda _: _signal_runner(process), REMOTE_GRACE_SECONDS)
            if stop.signals:
                _signal_group(process.pid, signal.SIGKILL)
        sorter.join(timeout=GRACE_SECONDS)
    return _ending(process.returncode, stop.signals, log, lost=False, resumable=True)


def _wait(
    process: subprocess.Popen[Any],
    stop: _Stop,
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
            _signal_group(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _signal_ranks(group: int, module: str, number: signal.Signals) -> None:
    """Send SIGINT or SIGTERM to the ranks; with no rank yet there is nothing to save: end all."""
    ranks = _running(group, module)
    if not ranks:
        _signal_group(group, signal.SIGKILL)
    for rank in ranks:
        _try_signal(rank, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _end_ranks(group: int, module: str) -> None:
    """End ranks that outlived the launcher, but nothing that they left running on purpose."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in _running(group, module):
        _try_signal(process, signal.SIGTERM)
    while left := _running(group, module) + _running(group, PER_NODE_MODULE):
        if time.monotonic() > deadline:
            for process in left:
                _try_signal(process, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _kill_ranks(group: int, module: str) -> None:
    for process in _running(group, module):
        _try_signal(process, signal.SIGKILL)


def _running(group: int, module: str) -> list[psutil.Process]:
    """Processes of the group that run ``python -u -m module``, without their own worker copies."""
    found = {}
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) != group or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.cmdline()[1:4] == ["-u", "-m", module]:  # as the launcher starts them
                found[process.pid] = (process, process.ppid())
        except (psutil.Error, OSError):
            continue
    return [process for process, parent in found.values() if parent not in found]


def _signal_runner(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGTERM)


def _signal_group(group: int, number: signal.Signals) -> None:
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
def _guarded(group: int) -> Iterator[None]:
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


def _sort_lines(source: IO[str], chatter: IO[str], terminal: IO[str]) -> None:
    for line in source:
        stream = chatter if CHATTER.match(line) else terminal
        stream.write(line)
        stream.flush()


def _ending(
    returncode: int,
    stopped: Sequence[signal.Signals],
    log: Path,
    *,
    lost: bool,
    resumable: bool,
    first: tuple[str, int] = ("", 0),
    hung: str = "",
) -> Ending:
    """The exit code that the ranks meant, and a message where they cannot have given one.

    Args:
        lost: a rank did not end well.
        first: the rank that was lost first, and the signal that ended it, if one has.
        hung: why the ranks have given one up.
        resumable: the same command goes on with what was stopped, or begins it anew.
    """
    if returncode == EXIT_DONE and not lost:
        return Ending(EXIT_DONE)
    if returncode in (EXIT_BAD_INPUT, EXIT_RESUMABLE):
        return Ending(returncode)  # rank 0 has said why
    if stopped:
        said = f"stopped by {stopped[0].name}; all processes have ended"
        if resumable:
            return Ending(EXIT_RESUMABLE, f"{said}; the same command goes on from its checkpoint")
        return Ending(EXIT_FAILURE, said)
    if hung:
        how = hung
    elif returncode == EXIT_DONE:
        how = "the launcher was killed and the ranks did not finish"
    else:
        who, by = first
        how = _describe(-by or returncode, who or "a process")
    return Ending(EXIT_FAILURE, f"{how}; see the logs in {log.parent}")


def _describe(returncode: int, who: str) -> str:
    """``sys.exit(-9)`` of the launcher, its way to say "killed by signal 9", arrives as 247."""
    number = -returncode if returncode < 0 else 256 - returncode if returncode > 192 else 0
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"{who} ended with exit code {returncode}"
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    return f"{who} was killed by {name}{hint}"
