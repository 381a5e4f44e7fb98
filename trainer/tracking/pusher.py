"""Send what an output folder has and an MLflow store has not. Used by sidecar and ``sync``."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.config.tracking import HTTP, scheme_of
from trainer.runtime.errors import BadInput
from trainer.tracking.final_results import ReadResults
from trainer.tracking.metrics_log import METRICS_FILE, SYSTEM_FILE, Line
from trainer.tracking.mlflow_store import MlflowStore
from trainer.tracking.progress_file import ProgressFile, StoreProgress
from trainer.tracking.run_metadata import Artifact, RunMetadata
from trainer.tracking.store_uri import ARTIFACTS, DATABASE, StoreAddress, resolve, sync_command

logger = logging.getLogger(__name__)
TAILED = (METRICS_FILE, SYSTEM_FILE)
LINES_PER_ROUND = 2000
STATUS = {"finished": "FINISHED", "failed": "FAILED"}
#: MLflow's names of answers, by the status that the server gave.
HTTP_STATUS = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}


@dataclass(frozen=True)
class Unsent:
    """What a store does not have yet, as far as the folder knows."""

    lines: int
    artifacts: int
    status: bool

    def __bool__(self) -> bool:
        return bool(self.lines or self.artifacts or self.status)

    def __str__(self) -> str:
        parts = []
        if self.lines:
            parts.append(f"{self.lines} metric lines")
        if self.artifacts:
            parts.append(f"{self.artifacts} files")
        if self.status:
            parts.append("the run's final status")
        return ", ".join(parts) or "nothing"


@dataclass(frozen=True)
class SyncResult:
    """How a ``sync`` went."""

    complete: bool
    points: int  #: metric values sent by this call
    unsent: Unsent
    target: str  #: the store, without credentials
    run_id: str | None
    message: str  #: for a person, without credentials


class Pusher:
    """Sends what is new since the last call; keeps ``tracking.json``.

    Args:
        read_results: reads the final results of the folder; required by ``end`` alone.
    """

    def __init__(
        self,
        output_dir: Path,
        target: StoreAddress,
        state: ProgressFile,
        read_results: ReadResults | None = None,
    ) -> None:
        self.folder = RunMetadata(output_dir)
        self.target, self.state, self.read_results = target, state, read_results
        self.progress = state.stores.setdefault(target.name, StoreProgress())
        self.points = 0
        self._store: MlflowStore | None = None

    @property
    def connected(self) -> bool:
        """Whether the store's runs are known; if not, ``push`` begins by finding or making them."""
        return self._store is not None

    def push(self, *, running: bool) -> None:
        """Connect if need be, then send new lines and the files known at the start.

        Raises whatever went wrong, after forgetting the connection: the next call asks the store
        again what it has.
        """
        try:
            store = self._connect(running)
            if running and self.progress.status != "RUNNING":
                self._save(status="RUNNING")
            self._send_artifacts(store, self.folder.early_artifacts())
            for name in TAILED:
                self._send_lines(store, name)
        except BaseException:
            self._store = None
            raise

    def end(self) -> None:
        """Send the rest, then say how the run ended: by ``summary.json``, else it was killed."""
        self.push(running=False)
        store = self._store
        assert store is not None
        failed = self._send_artifacts(store, self.folder.late_artifacts())
        summary = self._summary()
        status = STATUS.get(str(summary.get("status")), "KILLED")
        assert self.read_results is not None
        results = self.read_results(self.folder.path) if summary else None
        store.end(status, results, self._ended())
        self._save(status=status)
        if failed:
            raise failed[0]

    def unsent(self) -> Unsent:
        lines = 0
        for name in TAILED:
            offset = _offset(self.folder.path / name, name, self.progress)
            lines += sum(1 for _ in self.folder.lines(name, offset))
        artifacts = [*self.folder.early_artifacts(), *self.folder.late_artifacts()]
        missing = [a for a in artifacts if self.progress.artifacts.get(a.key) != a.digest()]
        wanted = STATUS.get(str(self._summary().get("status")), "KILLED")
        return Unsent(lines, len(missing), self.progress.status != wanted)

    def _connect(self, running: bool) -> MlflowStore:
        if self._store is None:
            store = MlflowStore(self.folder, self.target, self.state.output_id)
            store.attach(self.progress, running=running)
            if store.is_new:  # also: a store that lost what it once had
                self.progress.offsets, self.progress.tails = {}, {}
                self.progress.artifacts = {}
            self.state.store = self.target.name
            self._save()
            self._store = store
            logger.info("run %s in %s", self.progress.run_id, self.target.name)
        return self._store

    def _send_lines(self, store: MlflowStore, name: str) -> None:
        path = self.folder.path / name
        lines = self.folder.lines(name, _offset(path, name, self.progress))
        while batch := list(islice(lines, LINES_PER_ROUND)):
            good: list[Line] = [line for line, _ in batch if line is not None]
            if len(good) < len(batch):
                logger.warning("%s: %d garbled lines left out", name, len(batch) - len(good))
            self.points += store.send(good)
            self.progress.offsets[name] = batch[-1][1]
            self.progress.tails[name] = _tail(path, batch[-1][1])
            self._save()

    def _send_artifacts(self, store: MlflowStore, artifacts: list[Artifact]) -> list[Exception]:
        """Files that cannot be sent hold up nothing else; they are tried again at the next call."""
        errors: list[Exception] = []
        for artifact in artifacts:
            digest = artifact.digest()
            if self.progress.artifacts.get(artifact.key) == digest:
                continue
            try:
                store.upload(artifact)
            except Exception as error:
                text = explain(error, self.target, self.folder.path)
                logger.warning("%s: not sent: %s", artifact.path.name, text)
                errors.append(error)
                continue
            self.progress.artifacts[artifact.key] = digest
            self._save()
        return errors

    def _summary(self) -> dict[str, Any]:
        return self.folder.summary(self.state.stale_summary_ns)

    def _ended(self) -> float:
        """Unix seconds of the last sign of life; the same at every call on an unchanged folder."""
        names = ["summary.json"] if self._summary() else [*TAILED, "run.yaml"]
        times = [p.stat().st_mtime for n in names if (p := self.folder.path / n).exists()]
        return max(times, default=0.0)

    def _save(self, status: str | None = None) -> None:
        self.progress.status = status or self.progress.status
        self.state.save()


def sync(output_dir: Path | str, read_results: ReadResults, uri: str | None = None) -> SyncResult:
    """Send everything of a run that has ended and that its store does not have; idempotent.

    Args:
        read_results: reads the final results of the folder.
        uri: the store's address, given by the person; default: as ``target.resolve`` chooses.

    Raises:
        BadInput: not an output folder, its run is still sending, or the address cannot be used.
    """
    output_dir = Path(output_dir)
    folder = RunMetadata(output_dir)
    if folder.file("run.yaml") is None:
        raise BadInput(f"{output_dir} is not a run directory (no run.yaml)")
    saved = folder.tracking.get("uri")
    target = resolve(output_dir, uri, saved if isinstance(saved, str) else None)
    with target.applied(), folder_lock(output_dir) as free:
        if not free:
            raise BadInput(f"{output_dir}: its run is still sending; sync when it has ended")
        pusher = Pusher(output_dir, target, ProgressFile(output_dir), read_results)
        problem = ""
        for left in (2, 1, 0):
            try:
                pusher.end()
                problem = ""
                break
            except Exception as error:
                logger.debug("sync", exc_info=True)
                problem = explain(error, target, output_dir)
                if not left or not is_busy(error):
                    break
        unsent = pusher.unsent()
    return SyncResult(
        complete=not unsent and not problem,
        points=pusher.points,
        unsent=unsent,
        target=target.name,
        run_id=pusher.progress.run_id,
        message=_message(pusher, unsent, problem),
    )


def explain(error: BaseException, target: StoreAddress, output_dir: Path) -> str:
    """What went wrong, in one line for a person, with the remedy where it is known."""
    text = target.hide(" ".join(str(error).split())) or type(error).__name__
    status = _http_status(error)
    if "Invalid Host header" in text:
        host = urlsplit(target.name).netloc
        text += f"; start the server with: mlflow server --allowed-hosts {host}"
    elif status in (401, 403) and not target.trusted:
        text += (
            "; MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN were not sent, as only the folder "
            f"names this server; if it is yours, run: {sync_command(output_dir, target.name)}"
        )
    elif status in (401, 403):
        text += "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
    return text[:1000]


def _http_status(error: BaseException) -> int | None:
    """The status of the server's answer that MLflow or requests made this error of."""
    code = getattr(error, "error_code", None)  # of mlflow's exceptions
    if code in HTTP_STATUS:
        return HTTP_STATUS[code]
    response = getattr(error, "response", None)  # of requests' exceptions
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def is_busy(error: BaseException) -> bool:
    """Whether another process was writing to the store: the next try may succeed."""
    return getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE"


def _message(pusher: Pusher, unsent: Unsent, problem: str) -> str:
    target, progress = pusher.target, pusher.progress
    if problem or unsent:
        return f"{target.name}: {problem or 'not everything was sent'}. Not sent: {unsent}"
    where = where_to_look(target, progress.page)
    return f"MLflow has all of run {progress.run_id} ({pusher.points} new points).\n{where}"


def where_to_look(target: StoreAddress, page: str | None) -> str:
    """The address of the web page with the curves, after the command that serves it if need be."""
    if scheme_of(target.uri) in HTTP:
        return f"{target.name}/{page or ''}"
    command = "mlflow ui"
    if not _is_default_here(target):
        command += f" --backend-store-uri {shlex.quote(target.name)}"
    return f"{command}\nthen open http://127.0.0.1:5000/{page}" if page else command


def _is_default_here(target: StoreAddress) -> bool:
    """Whether ``mlflow ui`` alone shows this store, called in the working directory."""
    if "MLFLOW_TRACKING_URI" in os.environ or "MLFLOW_BACKEND_STORE_URI" in os.environ:
        return False
    older = any(Path(ARTIFACTS).glob("[0-9]*/meta.yaml"))  # runs of MLflow 2 would be shown
    return target.database == Path.cwd() / DATABASE and not older


@contextlib.contextmanager
def folder_lock(output_dir: Path) -> Iterator[bool]:
    """Whether this process is now the only one that sends from ``output_dir``.

    The kernel lets go of the lock with its process. Where the file system has no locks, everyone
    is let in.
    """
    path = output_dir / "logs" / "tracking.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    # The folder may come from elsewhere: no symlink is followed to another file.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; remove it") from None
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                yield False
                return
            logger.warning("%s: cannot be locked: %s", path, error)
        yield True


def _offset(path: Path, name: str, progress: StoreProgress) -> int:
    """Where to read on; from the start where the file is not the one that was read (rewound)."""
    offset = progress.offsets.get(name, 0)
    return offset if offset and _tail(path, offset) == progress.tails.get(name) else 0


def _tail(path: Path, offset: int) -> str:
    """Digest of the bytes in front of ``offset``; a line has its time in it, so they differ."""
    try:
        with path.open("rb") as file:
            start = max(0, offset - 512)
            file.seek(start)
            data = file.read(offset - start)
    except OSError:
        return ""
    return hashlib.sha256(data).hexdigest()[:16] if len(data) == offset - start else ""
