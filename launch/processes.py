"""Run the DeepSpeed launcher: its output to a log, signals to the ranks, no orphans.

Facts about the launcher (0.19.8) that this file relies on: its per-node part turns a signal into
exit code 1 and hides the ranks' own codes, so signals go to the ranks and not to it; and as Slurm
sends a signal to every process of a job's step, it is started with stop signals blocked, which the
ranks unblock once they can handle them. Exit code 0 counts only if its log names every rank and
rank 0 has removed a file: some other program may have run in place of ours.
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
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from launch import guard, messages
from trainer import bootstrap
from trainer.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_PORT_TAKEN,
    EXIT_RESUMABLE,
    BadInput,
)
from trainer.process import UNFINISHED, ended_by, process_start
from trainer.redact import redact
from trainer.terminal import VARIABLE as STDOUT_FD_VARIABLE
from trainer.watchdog import LOST, read_lost

GRACE_SECONDS = guard.GRACE_SECONDS  # between asking a rank to end and ending it
STOP_SECONDS = 600.0  # the same where it may end its step first, and save
LOSS_SECONDS = 15.0  # the same where another rank has failed: it may wait for that one
HURRY_SECONDS = 10.0  # a second Ctrl-C before that is taken for the same
TRAINER = "trainer"  # the one module whose runs can be resumed
REMOTE_GRACE_SECONDS = 30.0  # the launcher ends ranks on other hosts over ssh
POLL_SECONDS = 0.1
REAL_STDOUT = 1  # as a descriptor, whatever sys.stdout has been replaced with
CHATTER = re.compile(r"^(\S+: )?\[\d{4}-\d\d-\d\d [\d:,]+\] \[[A-Z]+\] \[")
SPAWNED = re.compile(r"process (\d+) spawned with command")
ENDING_OTHERS = "Killing subprocess"  # the launcher says so once a rank has failed
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Ending:
    """Our exit code, and a message if rank 0 has not printed one.

    Attributes:
        port_taken: nothing was done, as another process listened at the port of the ranks.
    """

    code: int
    message: str = ""
    port_taken: bool = False


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

    Rank 0 gets our stdout as descriptor 0 (trainer/terminal.py); stderr is shared, for errors that
    come before a rank has opened its log.

    Args:
        grace_seconds: between a stop signal and the end of ranks that do not stop.
        first_rank: of this machine, among all of the run.
    """
    (log.parent / LOST).unlink(missing_ok=True)
    unfinished = log.absolute().with_suffix(".unfinished")
    environment = {**environment, STDOUT_FD_VARIABLE: "0"}
    if first_rank == 0:
        unfinished.touch()
        environment[UNFINISHED] = str(unfinished)
    stop = _Stop()
    with log.open("wb") as chatter, stop.listening():
        with _blocked(STOPPING):
            process = start(
                command,
                env=environment,
                stdin=REAL_STDOUT,
                stdout=chatter,
                start_new_session=True,  # a group of its own: the terminal's Ctrl-C reaches only us
            )
        with _guarded(process.pid):
            forward = functools.partial(_signal_ranks, process.pid)
            end = functools.partial(_kill_ranks, process.pid)
            losses = _Losses(log, ranks, first_rank, end)
            _wait(process, stop, forward, grace_seconds, losses.look)
            _end_ranks(process.pid)
    finished = len(re.findall("exits successfully", log.read_text(errors="replace")))
    done = finished == ranks and not (first_rank == 0 and unfinished.exists())
    unfinished.unlink(missing_ok=True)
    return _ending(
        process.returncode,
        stop.signals,
        log,
        lost=not done,
        resumable=module == TRAINER,
        first=losses.first,
        hung=read_lost(log.parent),
    )


def run_remote(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Ending:
    """Run the launcher over several hosts and separate its own lines from those of rank 0."""
    stop = _Stop()
    with (
        tempfile.TemporaryDirectory(prefix="promptshard-") as folder,
        log.open("w") as chatter,
        stop.listening(),
    ):
        process = start(
            command,
            cwd=bootstrap.ROOT,
            env=_exported(environment, Path(folder)),
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


def _exported(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the environment of the launcher that reaches other hosts over ssh.

    The launcher reads ``.deepspeed_env`` of its working directory, which is not the person's, and
    puts variables of MLflow on command lines, where everyone can read a password.
    """
    result = dict(environment)
    name = result.get("DS_ENV_FILE", ".deepspeed_env")
    texts = [
        path.read_text().rstrip("\n")
        for path in (Path.home() / name, Path(name).absolute())
        if path.is_file()
    ]
    merged = folder / "deepspeed_env"
    merged.write_text("".join(f"{text}\n" for text in texts if text))
    result["DS_ENV_FILE"] = str(merged)
    secret = [
        name
        for name, value in result.items()
        if name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
        or (name.startswith("MLFLOW") and redact(value) != value)
    ]
    for name in secret:
        del result[name]
    if secret:
        messages.note(
            f"not passed over ssh, where everyone could read it: {', '.join(secret)}; set it on "
            "the first host, or upload at the end with promptshard sync"
        )
    return result


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


def _signal_ranks(group: int, number: signal.Signals) -> None:
    """Send SIGINT or SIGTERM to the ranks; without a rank there is nothing to save: kill all."""
    ranks = _running(group)
    if not ranks:
        _signal_group(group, signal.SIGKILL)
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
        said = f"Stopped by {stopped[0].name}; all processes have ended."
        if resumable:
            return Ending(EXIT_RESUMABLE, f"{said} Rerun the command to resume.")
        return Ending(EXIT_FAILURE, said)
    if returncode == EXIT_PORT_TAKEN:
        return Ending(EXIT_FAILURE, "the port for the ranks is used by another process", True)
    if hung:
        how = hung
    elif returncode == EXIT_DONE:
        how = "the processes ended with exit code 0, but rank 0 did not finish its work"
    else:
        who, by = first
        who = who or ("the launcher" if returncode < 0 else "a process")
        how = _describe(-by or returncode, who)
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
