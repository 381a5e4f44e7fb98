"""One run per output folder: a lock file with a heartbeat, which a dead node cannot keep.

``run.lock`` says who writes to the folder. It is made by link(2): whole, and by one process alone,
on local and network file systems; flock is not needed. Its holder touches it now and then. A lock
is taken over, with a word, if its holder is dead for certain: the process is gone from this host,
the same Slurm job was requeued, or the lock was not touched for ``DEAD_SECONDS``.

Standard library only.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.runtime.errors import BadInput
from trainer.runtime.process import UNKNOWN, process_start, read_text

LOCK = "run.lock"
BEAT_SECONDS = 15.0
#: Beyond what a network file system may hide a touch for, and a rank may be too busy for a beat.
DEAD_SECONDS = 120.0
MAX_BYTES = 1 << 16
_ATTEMPTS = 10


class LockLost(RuntimeError):
    """Another process writes to the output folder now."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock belongs to.

    Attributes:
        boot: names this start of the host's kernel.
        namespace: in which ``pid`` counts: containers of one host have their own.
        started: of the process, in the kernel's ticks: a number may be used again.
        since: when it took the lock.
        job, restarts: of Slurm.
        token: of this lock alone.
    """

    host: str
    pid: int
    boot: str
    namespace: str
    started: str
    since: str
    job: str | None
    restarts: int
    token: str

    @staticmethod
    def here() -> Holder:
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        return Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            boot=read_text("/proc/sys/kernel/random/boot_id"),
            namespace=_link("/proc/self/ns/pid"),
            started=process_start(os.getpid()),
            since=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(restarts) if restarts.isdigit() else 0,
            token=uuid.uuid4().hex,
        )

    def why_dead(self, ours: Holder, age: float) -> str | None:
        """In words, or None if it may be alive.

        Args:
            age: seconds since the lock was touched.
        """
        same = (self.host, self.boot, self.namespace) == (ours.host, ours.boot, ours.namespace)
        if same:
            now = process_start(self.pid)
            alive = now and (now == self.started or UNKNOWN in (now, self.started))
            return None if alive else "that process is gone"
        if self.job is not None and self.job == ours.job and self.restarts < ours.restarts:
            return f"Slurm job {self.job} was requeued"
        if age > DEAD_SECONDS:
            return f"it has given no sign for {age:.0f} s"
        return None

    def __str__(self) -> str:
        job = "" if self.job is None else f" of Slurm job {self.job}"
        return f"process {self.pid} on {self.host}{job}"


@dataclass(frozen=True)
class _ExistingLock:
    """A lock that is there; ``holder`` is None where it cannot be read."""

    holder: Holder | None
    token: str
    touched: float


class Lock:
    """A lock that this process holds, and touches in a thread of its own until ``release``."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self._lost: str | None = None
        self._touched = time.time()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Whether the folder is still ours: this process may have been stopped for minutes.

        Raises:
            LockLost: if another process has taken the lock over.
        """
        if self._lost is not None:
            raise LockLost(self._lost)

    def confirm(self) -> None:
        """``check``, by looking at the file now.

        Raises:
            LockLost: as ``check``.
            OSError: if the file system does not answer.
        """
        self.beat()
        self.check()

    def release(self) -> None:
        self._done.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()

    def beat(self) -> None:
        """Touch the lock; see whether it is still ours."""
        if self._is_ours():
            os.utime(self.path)
            self._touched = time.time()
            return
        if time.time() - self._touched > DEAD_SECONDS:
            # Another process may have taken it over in this time, and may have ended since.
            self._lost = f"{self.path}: is gone, and this process gave no sign for too long"
            return
        # Gone: somebody deleted it. If nobody else has the folder since, it is ours.
        with _proposal(self.path, self.holder) as proposal:
            if _link_to(proposal, self.path):
                return
        found = _look(self.path)
        now = found.holder if found else None
        self._lost = f"{self.path}: {now or 'another process'} has taken this run over"

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS) and self._lost is None:
            with contextlib.suppress(OSError):  # the file system is away; the next beat tries again
                self.beat()

    def _is_ours(self) -> bool:
        found = _look(self.path)
        return found is not None and found.token == self.holder.token


def acquire(folder: Path, say: Callable[[str], None]) -> Lock:
    """Take the lock of an output folder, which must be there.

    Args:
        say: called when the lock of a dead holder is taken over.

    Raises:
        BadInput: if another process that may be alive holds it.
    """
    path, ours = folder / LOCK, Holder.here()
    try:
        before = _take(path, ours)
    except _Held as held:
        raise BadInput(_refusal(folder, path, held.found)) from None
    if before is not None:
        say(f"the lock of {folder} was taken over from {before}")
    return Lock(path, ours)


class _Held(Exception):
    def __init__(self, found: _ExistingLock | None) -> None:
        self.found = found


def _take(path: Path, ours: Holder) -> str | None:
    """Make the file ours; whose it was, and why it is no more, if it was a dead holder's.

    Raises:
        _Held: if its holder may be alive.
    """
    with _proposal(path, ours) as proposal:
        for _ in range(_ATTEMPTS):
            if _link_to(proposal, path):
                return None
            os.utime(proposal)  # the file system's clock, which lock and proposal share
            found = _look(path)
            if found is None:
                continue
            why = _why_dead(found, ours, proposal.stat().st_mtime)
            if why is None:
                raise _Held(found)
            # Only one of several processes that see the same stale lock may take it over. The
            # takeover is guarded by a second lock file, which can also become stale.
            claim = path.with_name(f"{path.name}.{found.token}")
            _take(claim, ours)
            try:
                now = _look(path)
                if now is not None and now.token == found.token:
                    proposal.rename(path)
                    return f"{found.holder or 'an unknown process'}: {why}"
            finally:
                claim.unlink(missing_ok=True)
    raise _Held(None)


def running_process(folder: Path) -> str | None:
    """Return the process that holds an output folder's lock and may be alive, in words."""
    try:
        found = _look(folder / LOCK)
    except (BadInput, OSError):
        return None
    if found is None or found.holder is None:
        return None
    age = max(0.0, time.time() - found.touched)
    if found.holder.why_dead(Holder.here(), age) is not None:
        return None
    return f"{found.holder} since {found.holder.since}"


def refuse_if_alive(folder: Path) -> None:
    """Check a lock without writing: whether its holder is alive on this host.

    Raises:
        BadInput: if so.
    """
    path = folder / LOCK
    found = _look(path)
    if found is None or found.holder is None:
        return
    # Of others ``acquire`` decides: the age of their lock is not known here.
    if found.holder.why_dead(Holder.here(), DEAD_SECONDS + 1) is None:
        raise BadInput(_refusal(folder, path, found))


def _refusal(folder: Path, path: Path, found: _ExistingLock | None) -> str:
    holder = found.holder if found else None
    who = f"{holder} since {holder.since}" if holder else "an unknown process"
    return (
        f"output_dir: {folder} is in use by {who}; wait for its end or stop it, or give another "
        f"output_dir (if you know that it is dead, delete {path})"
    )


def _why_dead(found: _ExistingLock, ours: Holder, now: float) -> str | None:
    age = now - found.touched
    if found.holder is not None:
        return found.holder.why_dead(ours, age)
    return f"{LOCK} cannot be read and is {age:.0f} s old" if age > DEAD_SECONDS else None


def _look(path: Path) -> _ExistingLock | None:
    """The lock that is there now; opened, so that a network file system asks its server.

    Raises:
        BadInput: if there is something else in its place.
    """
    try:
        with path.open("rb") as file:
            content, touched = file.read(MAX_BYTES), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EACCES, errno.ELOOP):
            raise  # the file system is away
        raise BadInput(
            f"output_dir: {path} cannot be read ({error.strerror}); delete it, or give another "
            "output_dir"
        ) from None
    holder = _holder(content)
    if holder is None:
        return _ExistingLock(None, hashlib.sha256(content).hexdigest()[:32], touched)
    return _ExistingLock(holder, holder.token, touched)


def _holder(content: bytes) -> Holder | None:
    """The holder in a lock's content; None if that is damaged."""
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    words = (holder.host, holder.boot, holder.namespace, holder.started, holder.since, holder.token)
    numbers = (holder.pid, holder.restarts)
    right = all(isinstance(word, str) for word in (*words, holder.job or "")) and all(
        isinstance(number, int) and 0 <= number < 1 << 31 for number in numbers
    )
    return holder if right and holder.token.isalnum() else None


@contextlib.contextmanager
def _proposal(path: Path, holder: Holder) -> Iterator[Path]:
    """The lock's content under a name of its own, gone afterwards."""
    proposal = path.with_name(f".{path.name}.{holder.token}")
    try:
        with proposal.open("w", encoding="utf-8") as file:
            json.dump(asdict(holder), file)
            file.flush()
            os.fsync(file.fileno())
        yield proposal
    finally:
        proposal.unlink(missing_ok=True)


def _link_to(proposal: Path, path: Path) -> bool:
    """Give the proposal the lock's name if nobody has it. Of many that try, one succeeds."""
    try:
        os.link(proposal, path)
        return True
    except FileExistsError:
        # Over NFS the answer to a link that was made may be lost, and the second try refused.
        return proposal.stat().st_nlink == 2
    except OSError:  # a file system without hard links
        return _create(path, proposal.read_bytes())


def _create(path: Path, content: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return True


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
