"""One run per output folder: a lock file with a heartbeat that works on network file systems.

``run.lock`` names the process that writes to the folder. It is created with ``O_EXCL``, which is
atomic on local file systems and on NFSv3 or later (open(2)). Its holder touches it every
``BEAT_SECONDS``. Another process takes the lock over only if the holder is certainly dead: the
process is gone from this host, the same Slurm job was requeued, or the lock was not touched for
``DEAD_SECONDS``.

``filelock.SoftFileLease`` is no replacement: it watches a lock of another host for the whole lease
before it decides, even the lock of a requeued job, it does not create a deleted lock again, and its
current versions need Python 3.11.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from trainer.runtime.errors import BadInput
from trainer.runtime.process import UNKNOWN, process_start, read_text

LOCK = "run.lock"
BEAT_SECONDS = 15.0
#: Longer than a network file system delays a touch and than a busy rank delays a heartbeat.
DEAD_SECONDS = 120.0
POLL_SECONDS = 1.0
MAX_BYTES = 1 << 16
_ATTEMPTS = 10
_Count = Annotated[int, Field(ge=0, lt=1 << 31)]


class LockLost(RuntimeError):
    """Another process writes to the output folder now."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; the JSON content of the lock file."""

    host: str
    pid: _Count
    boot: str  #: ID of the current boot of the host
    namespace: str  #: PID namespace of ``pid``; containers of one host have different ones
    started: str  #: start time of the process in kernel ticks, because PIDs are reused
    since: str  #: time at which it acquired the lock
    job: str | None  #: ID of the Slurm job
    restarts: _Count  #: of the Slurm job
    token: str  #: unique to this acquisition

    @staticmethod
    def here() -> Holder:
        """Describe this process."""
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        namespace = ""
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        return Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            boot=read_text("/proc/sys/kernel/random/boot_id"),
            namespace=namespace,
            started=process_start(os.getpid()),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(restarts) if restarts.isdigit() else 0,
            token=uuid.uuid4().hex,
        )

    def is_local_to(self, ours: Holder) -> bool:
        """Whether ``ours``, a holder here, can look up this holder's PID."""
        place = (self.host, self.boot, self.namespace)
        return place == (ours.host, ours.boot, ours.namespace)

    def why_dead(self, ours: Holder, age: float) -> str | None:
        """Return why this holder is certainly dead; None if it may be alive.

        ``age`` is in seconds since the lock was last touched.
        """
        if self.is_local_to(ours):
            now = process_start(self.pid)
            alive = now and (now == self.started or UNKNOWN in (now, self.started))
            return None if alive else "that process is gone"
        if self.job is not None and self.job == ours.job and self.restarts < ours.restarts:
            return f"Slurm job {self.job} was requeued"
        return f"no heartbeat for {age:.0f} s" if age > DEAD_SECONDS else None

    def to_json(self) -> str:
        """Return the content of a lock file."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        job = "" if self.job is None else f" of Slurm job {self.job}"
        return f"process {self.pid} on {self.host}{job}"


_HOLDER = TypeAdapter(Holder)


@dataclass(frozen=True)
class _LockFile:
    """A lock file as it was read; ``holder`` is None if its content is damaged."""

    content: bytes
    touched: float
    holder: Holder | None

    def why_dead(self, ours: Holder, now: float) -> str | None:
        """As ``Holder.why_dead``; ``now`` is in seconds of the file system's clock."""
        age = now - self.touched
        if self.holder is not None:
            return self.holder.why_dead(ours, age)
        return f"{LOCK} is damaged and {age:.0f} s old" if age > DEAD_SECONDS else None

    def __str__(self) -> str:
        return f"{self.holder} since {self.holder.since}" if self.holder else "an unknown process"


class Lock:
    """A lock that this process holds. A thread touches the file until ``release``."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self._lost: str | None = None
        self._touched = time.time()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``LockLost`` if another process has taken the lock over."""
        if self._lost is not None:
            raise LockLost(self._lost)

    def confirm(self) -> None:
        """Read the lock file now, then ``check``; ``OSError`` if the file system fails."""
        self.beat()
        self.check()

    def release(self) -> None:
        """Stop the heartbeat and delete the lock file if it is still this process's."""
        self._done.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError, BadInput):
            if self._is_ours(_read(self.path)):
                self.path.unlink()

    def beat(self) -> None:
        """Touch the lock file, or record that it was lost."""
        current = _read(self.path)
        if self._is_ours(current):
            os.utime(self.path)
            self._touched = time.time()
        elif time.time() - self._touched > DEAD_SECONDS:
            # Another process may have taken the lock over in the meantime and ended.
            self._lost = f"{self.path}: deleted while this process sent no heartbeat for too long"
        elif not _create(self.path, self.holder):  # not deleted, or created again
            holder = getattr(_read(self.path), "holder", None) or "another process"
            self._lost = f"{self.path}: {holder} has taken this run over"

    def _run(self) -> None:
        while not self._done.wait(BEAT_SECONDS) and self._lost is None:
            with contextlib.suppress(OSError, BadInput):  # retried by the next heartbeat
                self.beat()

    def _is_ours(self, file: _LockFile | None) -> bool:
        return file is not None and file.holder == self.holder


def acquire(folder: Path, report: Callable[[str], None]) -> Lock:
    """Acquire the lock of an output folder; call ``report`` after a takeover from a dead holder.

    A Slurm job may start seconds after another one was killed, and nobody starts it again. It waits
    until the holder is certainly dead, or has sent a heartbeat.

    Raises:
        BadInput: another process that may be alive holds the lock.
    """
    holder = Holder.here()
    _wait_for_heartbeat(folder / LOCK, holder, report)
    previous = _acquire(folder / LOCK, holder)
    if previous is not None:
        report(f"the lock of {folder} was taken over from {previous}")
    return Lock(folder / LOCK, holder)


def _wait_for_heartbeat(path: Path, ours: Holder, report: Callable[[str], None]) -> None:
    """In a Slurm job, wait while the lock of another job is neither touched nor stale."""
    file = _read(path)
    if ours.job is None or file is None or file.holder is None or file.holder.job == ours.job:
        return
    if file.holder.is_local_to(ours):
        return
    reported = False
    while file.why_dead(ours, _file_system_time(path.parent)) is None and _read(path) == file:
        if not reported:
            reported = True
            report(f"{path} is held by {file}; waiting for its next heartbeat")
        time.sleep(POLL_SECONDS)


def _acquire(path: Path, ours: Holder) -> str | None:
    """Create a lock file; return the dead holder that it was taken over from, if any."""
    previous, file = None, None
    for _ in range(_ATTEMPTS):
        if _create(path, ours):
            return previous
        file = _read(path)
        if file is None:
            continue
        why = file.why_dead(ours, _file_system_time(path.parent))
        if why is None:
            break
        # Only one of several processes that see the same stale lock may delete it. The takeover is
        # guarded by a second lock file, which can also become stale.
        claim = path.with_name(f"{path.name}.{hashlib.sha256(file.content).hexdigest()[:32]}")
        _acquire(claim, ours)
        try:
            now = _read(path)
            if now is not None and now.content == file.content:
                path.unlink()
                previous = f"{file.holder or 'an unknown process'}: {why}"
        finally:
            claim.unlink(missing_ok=True)
    raise BadInput(_in_use(path.parent, path, file))


@dataclass(frozen=True)
class LockState:
    """A lock file, as a process sees it that does not take the lock.

    Attributes:
        holder: None if the lock file is damaged or cannot be read.
        touched: time of the last heartbeat in Unix seconds; None if it is unknown.
        dead: why the holder is certainly dead; None if it may be alive.
    """

    holder: Holder | None
    touched: float | None
    dead: str | None


def lock_state(path: Path) -> LockState | None:
    """Read a lock file without taking the lock; None if there is no such file."""
    try:
        file = _read(path)
    except (BadInput, OSError):
        return LockState(None, None, f"{path.name} cannot be read")
    if file is None:
        return None
    return LockState(file.holder, file.touched, file.why_dead(Holder.here(), time.time()))


def refuse_if_alive(folder: Path, names: Sequence[str] = (LOCK,)) -> None:
    """Raise ``BadInput`` if a process of this host holds one of these locks; writes nothing.

    ``acquire`` checks holders on other hosts, by the clock of the file system.
    """
    ours = Holder.here()
    for path in (folder / name for name in names):
        file = _read(path)
        if file is None or file.holder is None or not file.holder.is_local_to(ours):
            continue
        if file.holder.why_dead(ours, 0.0) is None:
            raise BadInput(_in_use(folder, path, file))


def _in_use(folder: Path, path: Path, file: _LockFile | None) -> str:
    return (
        f"output_dir: {folder} is in use by {file or 'an unknown process'}; wait for it to "
        f"end, stop it, or give another output_dir (if it is certainly dead, delete {path})"
    )


def _read(path: Path) -> _LockFile | None:
    """Read a lock file; opening it makes NFS revalidate its cache.

    Raises:
        BadInput: the path is not a readable file.
        OSError: the file system does not answer.
    """
    try:
        with path.open("rb") as stream:
            content, touched = stream.read(MAX_BYTES), os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EACCES, errno.ELOOP):
            raise
        raise BadInput(
            f"output_dir: {path} cannot be read ({error.strerror}); delete it, or give another "
            "output_dir"
        ) from None
    try:
        holder = _HOLDER.validate_json(content, strict=True)
    except ValidationError:
        holder = None
    return _LockFile(content, touched, holder)


def _file_system_time(folder: Path) -> float:
    """Return the current time in Unix seconds by the clock that stamps the lock file."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _create(path: Path, holder: Holder) -> bool:
    """Create a lock file; False if the path exists. Of many processes that try, one succeeds."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(holder.to_json().encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True
