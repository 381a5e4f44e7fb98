"""The trainer's hold on the sidecar. Nothing here waits for a tracker, and nothing here raises."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.config.tracking import HTTP, scheme_of
from trainer.runtime import bootstrap
from trainer.runtime.errors import BadInput
from trainer.runtime.redact import HIDDEN, redact
from trainer.runtime.stdio import private

logger = logging.getLogger(__name__)
URI_VARIABLE = "PROMPTSHARD_TRACKING_URI"
#: Between two looks for problems of the sender.
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Finished:
    """What ``TrackingClient.finish`` found."""

    complete: bool
    message: str  #: for a person: where to look, or what is unsent and how to send it


class TrackingClient:
    """Starts ``python -m trainer.commands.sync follow``, which tails ``metrics.jsonl`` into MLflow.

    Use it on one rank only. Before ``start``: ``run.yaml``, ``environment.json`` and
    ``datasets.json`` are written and ``metrics.jsonl`` is rewound. Before ``finish``:
    ``summary.json``, ``report.html`` and ``prompts/`` are.

    Args:
        uri: ``tracking.uri`` as the person wrote it, with credentials: the copy in ``run.yaml``
            has none. Handed on by environment, never by command line.
        every: seconds between two rounds of sending.
        grace: seconds the sidecar may continue sending when the trainer is gone.
    """

    def __init__(
        self,
        output_dir: Path | str,
        uri: str | None = None,
        *,
        every: float = 2.0,
        grace: float = 10.0,
    ) -> None:
        self.output_dir = Path(output_dir).resolve()
        self.uri, self.every, self.grace = uri, every, grace
        self._process: subprocess.Popen[bytes] | None = None
        self._shown: str | None = None
        self._look_at = 0.0
        self._read: int | None = None

    @property
    def _log(self) -> Path:
        return self.output_dir / "logs" / "tracking.log"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, *, finished: bool = False) -> None:
        """Start the sidecar; if that cannot be, training continues and ``finish`` tells.

        Args:
            finished: ``summary.json`` is of this run; otherwise one that exists is of an earlier
                session.
        """
        stale = None if finished else _mtime_ns(self.output_dir / "summary.json")
        options = {
            "output_dir": str(self.output_dir),
            "parent": os.getpid(),
            "stale_summary_ns": stale,
            "every": self.every,
            "grace": self.grace,
        }
        try:
            log = self.output_dir / "logs" / "tracking.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(private(log), "ab") as out:
                self._process = subprocess.Popen(
                    [*bootstrap.command("trainer.commands.sync"), "follow", json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    env=self._environment(),
                    start_new_session=True,  # a Ctrl-C is for the trainer
                )
        except OSError as error:
            logger.warning("MLflow: the sender could not be started: %s", error)

    def finish(self, timeout_s: float = 20.0) -> Finished:
        """Give the sidecar at most ``timeout_s`` to send the rest; it is gone afterwards."""
        process, self._process = self._process, None
        code: int | None = None
        if process is not None:
            try:
                assert process.stdin is not None
                process.stdin.write(f"finish {timeout_s}\n".encode())
                process.stdin.close()
            except OSError:
                pass  # it is gone already; its exit code tells
            try:
                code = process.wait(timeout_s + 1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return self._result(code == 0)

    def has_unsent(self) -> bool:
        """Whether the store lacks anything of a run that has ended, as far as the folder knows."""
        from trainer.tracking.progress_file import ProgressFile
        from trainer.tracking.pusher import Pusher
        from trainer.tracking.store_uri import resolve

        try:
            target = resolve(self.output_dir, self.uri)
            state = ProgressFile(self.output_dir)
            state.stale_summary_ns = None
            return bool(Pusher(self.output_dir, target, state).unsent())
        except (BadInput, OSError):
            return True

    @property
    def is_local(self) -> bool:
        """Whether the store is a file: slow at worst, never out of reach."""
        from trainer.tracking.store_uri import resolve

        try:
            return resolve(self.output_dir, self.uri).database is not None
        except BadInput:
            return True

    def news(self) -> str | None:
        """Return a new problem of the sender, or None; checks every few seconds at most."""
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + LOOK_SECONDS
        problem = self._problem()
        if problem in (None, self._shown):
            return None
        self._shown = problem
        return f"MLflow: {problem}. Training continues; all numbers are kept in metrics.jsonl"

    def _problem(self) -> str | None:
        from trainer.tracking.progress_file import FILE, ProgressFile
        from trainer.tracking.store_uri import resolve

        if self._process is None or self._process.poll() is not None:
            try:
                resolve(self.output_dir, self.uri)
            except BadInput as error:
                return redact(str(error))
            return f"the sender has ended; reasons are in {_quoted(self._log)}"
        written = _mtime_ns(self.output_dir / FILE)
        if written is None or written == self._read:
            return self._shown
        self._read = written
        return ProgressFile(self.output_dir).problem

    def _result(self, complete: bool) -> Finished:
        # Late imports: the training process needs none of this while it trains.
        from trainer.tracking.progress_file import ProgressFile
        from trainer.tracking.pusher import Pusher, where_to_look
        from trainer.tracking.run_metadata import RunMetadata
        from trainer.tracking.store_uri import resolve

        again = sync_later(self.output_dir, None)
        try:
            target = resolve(self.output_dir, self.uri)
            state = ProgressFile(self.output_dir)
            pusher = Pusher(self.output_dir, target, state)
            unsent = None if complete else pusher.unsent()
            saved = RunMetadata(self.output_dir).tracking.get("uri")
            again = sync_later(self.output_dir, target.name, saved)
        except (BadInput, OSError) as error:
            return Finished(False, f"MLflow: {redact(str(error))}; then: {again}")
        if not unsent:
            return Finished(True, where_to_look(target, pusher.progress.page))
        why = f" ({state.problem})" if state.problem else ""
        return Finished(
            False,
            f"MLflow ({target.name}) is missing {unsent}{why}, which are kept locally. Upload "
            f"with: {again} (reasons in {_quoted(self._log)})",
        )

    def _environment(self) -> dict[str, str]:
        """Return an environment with one thread, and the address where ``ps`` does not show it."""
        environment = dict(os.environ)
        environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"
        environment.pop(URI_VARIABLE, None)
        if self.uri:
            environment[URI_VARIABLE] = self.uri
        return environment


def sync_later(output_dir: Path, name: str | None, saved: str | None = None) -> str:
    """The command that sends the rest, with the address where the folder's own is not enough."""
    from trainer.tracking.store_uri import resolve, sync_command

    if saved and HIDDEN in saved and scheme_of(saved) not in HTTP:
        return sync_command(output_dir)  # it asks for the whole address
    try:
        later = resolve(output_dir, saved=saved)
        confirm = later.name != name or not later.trusted
    except BadInput:
        confirm = True
    return sync_command(output_dir, name if confirm else None)


def _mtime_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _quoted(path: Path) -> str:
    """Relative where that is shorter, ready to paste."""
    with contextlib.suppress(ValueError, OSError):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))
