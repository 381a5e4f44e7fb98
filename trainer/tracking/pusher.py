"""Send the data of an output folder that an MLflow store lacks; used by the sender and by sync."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trainer.config.tracking import HTTP, problem_of_name, scheme_of
from trainer.runtime.errors import BadInput
from trainer.tracking.metrics_log import METRICS_FILE, SYSTEM_FILE, Line
from trainer.tracking.mlflow_store import HANGING_SECONDS, MlflowStore
from trainer.tracking.model_sender import ModelSender
from trainer.tracking.progress_file import ProgressFile, StoreProgress
from trainer.tracking.refusals import explain, is_busy
from trainer.tracking.run_metadata import Artifact, ReadResults, RunMetadata
from trainer.tracking.store_uri import (
    ARTIFACTS,
    DATABASE,
    StoreAddress,
    install_ui_hint,
    resolve,
)

logger = logging.getLogger(__name__)
SENT_FILES = (METRICS_FILE, SYSTEM_FILE)
LINES_PER_BATCH = 2000
#: Pause after a failed upload, as metrics must not wait for a storage of files that is down: this
#: many seconds, and this many times as long as the upload took.
UPLOAD_PAUSE, UPLOAD_PAUSE_RATIO = 60.0, 9.0
#: MLflow's status by ``status`` of ``summary.json``; without one the run was killed.
STATUS = {"finished": "FINISHED", "failed": "FAILED"}


@dataclass(frozen=True)
class SyncResult:
    complete: bool
    points: int  #: metric values that this call has sent
    run_id: str | None
    message: str  #: for the user, without credentials


class Pusher:
    """Sends new data at each call and updates ``tracking.json``; ``end`` uses ``read_results``."""

    def __init__(
        self,
        output_dir: Path,
        target: StoreAddress,
        read_results: ReadResults | None = None,
        register: str | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        self.folder, self.state = RunMetadata(output_dir), ProgressFile(output_dir)
        self.target, self.read_results = target, read_results
        self.progress = self.state.stores.setdefault(target.name, StoreProgress())
        self.models = ModelSender(self.folder, self.progress, target, register, prompts)
        self.points = 0
        self._store: MlflowStore | None = None
        self._has_connected = False
        self.upload_problem: str | None = None  #: why files are not sent; a message for the user
        self._next_upload = 0.0

    @property
    def connected(self) -> bool:
        """Whether the store's runs are known; otherwise ``push`` finds or creates them first."""
        return self._store is not None

    def push(self, *, running: bool) -> None:
        """Connect if necessary, then send new lines and the files that exist from the start.

        After any error the next call connects again and queries the store. A failed upload is no
        error: a later call repeats it.
        """
        with self._reconnecting():
            store = self._push(running)
            if time.monotonic() < self._next_upload:
                return
            started, self.upload_problem = time.monotonic(), None
            if errors := self._send_artifacts(store, self.folder.early_artifacts()):
                seconds = time.monotonic() - started
                self.upload_problem = explain(errors[0], self.target, self.folder.path)
                self._next_upload = started + max(UPLOAD_PAUSE, UPLOAD_PAUSE_RATIO * seconds)

    def end(self) -> None:
        """Send the rest and the run's final status; after errors as ``push``."""
        with self._reconnecting():
            self._end()

    @contextlib.contextmanager
    def _reconnecting(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._store = None
            raise

    def _push(self, running: bool) -> MlflowStore:
        store = self._connect(running)
        if running and self.progress.status != "RUNNING":
            self._save(status="RUNNING")
        for name in SENT_FILES:
            self._send_lines(store, name)
        return store

    def _end(self) -> None:
        store = self._push(running=False)
        assert self.read_results is not None
        results = self.read_results(self.folder.path) if self.folder.summary() else None
        store.end(self._final_status(), results, self._end_time())
        self._save(status=self._final_status())
        # Last: a storage of files that hangs must not leave the run unfinished in MLflow.
        artifacts = [*self.folder.early_artifacts(), *self.folder.late_artifacts()]
        errors = self._send_artifacts(store, artifacts)
        if results is not None:
            errors += self.models.send(store, results, self.state.save)
        if errors:
            raise errors[0]

    def unsent(self) -> str:
        """Describe what the store lacks, according to tracking.json; empty if nothing."""
        offsets, digests = self.progress.offsets, self.progress.artifacts
        lines = sum(1 for name in SENT_FILES for _ in self.folder.lines(name, offsets.get(name, 0)))
        artifacts = [*self.folder.early_artifacts(), *self.folder.late_artifacts()]
        files = sum(digests.get(artifact.key) != artifact.digest() for artifact in artifacts)
        missing = {
            f"{lines} metric lines": lines,
            f"{files} files": files,
            **self.models.unsent(),
            "the run's final status": self.progress.status != self._final_status(),
        }
        return ", ".join(text for text, is_missing in missing.items() if is_missing)

    def set_problem(self, problem: str | None) -> None:
        """Store why nothing can be sent; the training process shows it on the terminal."""
        if self.state.problem != problem:
            self.state.problem = problem
            with contextlib.suppress(OSError):
                self.state.save()

    def _connect(self, running: bool) -> MlflowStore:
        if self._store is not None:
            return self._store
        # The store may create runs although its answer is lost: the next call must find them.
        self.state.save()
        store = MlflowStore(self.folder, self.target, self.state.output_id)
        store.attach(self.progress, running=running)
        if store.is_new:  # the store has lost runs, or never had them
            self.progress.artifacts = {}
            self.models.forget()
        if store.is_new or not self._has_connected:
            # A resumed run has rewound its metrics: each process reads them from the start, and
            # MlflowStore leaves out points that the store has.
            self.progress.offsets = {}
        self._has_connected = True
        self.state.store = self.target.name
        self._save()
        self._store = store
        logger.info("run %s in %s", self.progress.run_id, self.target.name)
        if self.folder.problem:
            logger.warning("settings are sent as written: %s", self.folder.problem)
        return store

    def _send_lines(self, store: MlflowStore, name: str) -> None:
        lines = self.folder.lines(name, self.progress.offsets.get(name, 0))
        while batch := list(islice(lines, LINES_PER_BATCH)):
            valid: list[Line] = [line for line, _ in batch if line is not None]
            if len(valid) < len(batch):
                logger.warning("%s: %d damaged lines left out", name, len(batch) - len(valid))
            self.points += store.send(valid)
            self.progress.offsets[name] = batch[-1][1]
            self._save()

    def _send_artifacts(self, store: MlflowStore, artifacts: list[Artifact]) -> list[Exception]:
        """Upload new and changed files. One that fails is tried again at the next call."""
        errors: list[Exception] = []
        for artifact in artifacts:
            digest, started = artifact.digest(), time.monotonic()
            if self.progress.artifacts.get(artifact.key) == digest:
                continue
            try:
                store.upload(artifact)
            except Exception as error:
                text = explain(error, self.target, self.folder.path)
                logger.warning("%s: not sent: %s", artifact.path.name, text)
                errors.append(error)
                if time.monotonic() - started > HANGING_SECONDS:
                    break
                continue
            self.progress.artifacts[artifact.key] = digest
            self._save()
        return errors

    def _final_status(self) -> str:
        return STATUS.get(str(self.folder.summary().get("status")), "KILLED")

    def _end_time(self) -> float:
        """Unix seconds of the folder's last change; equal at every call on an unchanged folder."""
        names = ["summary.json"] if self.folder.summary() else [*SENT_FILES, "run.yaml"]
        times = [p.stat().st_mtime for n in names if (p := self.folder.path / n).exists()]
        return max(times, default=0.0)

    def _save(self, status: str | None = None) -> None:
        self.progress.status = status or self.progress.status
        self.state.save()


def sync(
    output_dir: Path | str,
    read_results: ReadResults,
    uri: str | None = None,
    register: str | None = None,
    prompts: Sequence[str] = (),
) -> SyncResult:
    """Send all data of an ended run that its store lacks; idempotent.

    Args:
        register: as ``tracking.register``, in place of the run's.
        prompts: names of the prompts to register; empty: the best one of each task.
        uri: the store's address, given by the user; default: as ``resolve`` chooses.

    Raises:
        BadInput: not an output folder, its run is still sending, or the address is not usable.
    """
    output_dir = Path(output_dir)
    folder = RunMetadata(output_dir)
    if folder.file("run.yaml") is None:
        raise BadInput(f"{output_dir} is not a run directory (no run.yaml)")
    if register is not None and (problem := problem_of_name(register)):
        raise BadInput(f"--register: {problem}")
    if prompts and not (register or folder.tracking.register_as):
        raise BadInput("--prompt: chooses what is registered; add --register NAME")
    target = resolve(output_dir, uri, folder.tracking.uri)
    with target.applied(), folder_lock(output_dir) as acquired:
        if not acquired:
            raise BadInput(f"{output_dir}: its run is still sending; sync when it has ended")
        pusher = Pusher(output_dir, target, read_results, register, prompts)
        for _ in range(3):
            problem = ""
            try:
                pusher.end()
                break
            except Exception as error:
                logger.debug("sync", exc_info=True)
                problem = explain(error, target, output_dir)
                if not is_busy(error):
                    break
        unsent, run_id = pusher.unsent(), pusher.progress.run_id
    if problem or unsent:
        message = f"{target.name}: {problem or 'not everything was sent'}. Not sent: {unsent}"
    else:
        where = where_to_look(target, pusher.progress.page)
        message = f"MLflow has all of run {run_id} ({pusher.points} new points).\n{where}"
        message += f"\nnote: {pusher.progress.lacks}" if pusher.progress.lacks else ""
    if folder.problem:
        message = f"warning: settings were sent as written: {folder.problem}\n{message}"
    return SyncResult(not unsent and not problem, pusher.points, run_id, message)


def where_to_look(target: StoreAddress, page: str | None) -> str:
    """Return the address of the curves, with the command that serves it if there is no server."""
    if scheme_of(target.uri) in HTTP:
        return f"{target.name}/{page or ''}"
    command = "mlflow ui"
    if not _is_default_here(target):
        command += f" --backend-store-uri {shlex.quote(target.name)}"
    lines = [command]
    if page:
        lines.append(f"then open http://127.0.0.1:5000/{page}")
    return "\n".join([*lines, *filter(None, [install_ui_hint()])])


def _is_default_here(target: StoreAddress) -> bool:
    """Whether ``mlflow ui`` without options, in the working directory, shows this store."""
    if "MLFLOW_TRACKING_URI" in os.environ or "MLFLOW_BACKEND_STORE_URI" in os.environ:
        return False
    has_older_runs = any(Path(ARTIFACTS).glob("[0-9]*/meta.yaml"))  # MLflow would show those
    return target.database == Path.cwd() / DATABASE and not has_older_runs


@contextlib.contextmanager
def folder_lock(output_dir: Path) -> Iterator[bool]:
    """Yield whether this process is now the only one that sends from ``output_dir``.

    The kernel releases the lock when the process ends. On a file system without locks every
    process acquires it.
    """
    path = output_dir / "logs" / "tracking.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The folder may come from elsewhere: a symlink to another file is not followed.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; remove it") from None
    acquired = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        acquired = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        if acquired:
            logger.warning("%s: cannot be locked: %s", path, error)
    try:
        yield acquired
    finally:
        os.close(descriptor)
