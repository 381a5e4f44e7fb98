"""Start, monitor and end the sender from the training process, without raising its errors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.config.tracking import HTTP, scheme_of
from trainer.runtime import bootstrap
from trainer.runtime.errors import BadInput
from trainer.runtime.redact import HIDDEN, redact
from trainer.runtime.stdio import open_private
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.pusher import Pusher, where_to_look
from trainer.tracking.run_files import RunFiles
from trainer.tracking.store_uri import StoreAddress, for_shell, resolve, sync_command

logger = logging.getLogger(__name__)
URI_VARIABLE = "PROMPTSHARD_TRACKING_URI"
CHECK_SECONDS = 5.0


@dataclass(frozen=True)
class Finished:
    """Result of ``finish``: ``message`` has the curves' address, or how to send missing data."""

    complete: bool
    message: str


class TrackingClient:
    """Starts ``python -m trainer.commands.sync follow``, which sends ``metrics.jsonl`` to MLflow.

    Use it on one rank only. Before ``start``, write ``run.yaml``, ``environment.json`` and
    ``datasets.json``, rewind ``metrics.jsonl`` and delete an earlier session's ``summary.json``.
    Before ``finish``, write ``summary.json``, ``report.html`` and ``prompts/``.

    Args:
        uri: ``tracking.uri`` as the user wrote it, with the credentials that ``run.yaml`` hides.
        every: seconds between two rounds of sending.
        grace: seconds that the sender may continue after the trainer's death.
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
        self._log = self.output_dir / "logs" / "tracking.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._reported: str | None = None
        self._next_check = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the sender. If that fails, training continues and ``finish`` reports it."""
        options = {
            "output_dir": str(self.output_dir),
            "parent": os.getpid(),
            "every": self.every,
            "grace": self.grace,
        }
        environment = {k: v for k, v in os.environ.items() if k != URI_VARIABLE}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if self.uri:  # other users can read command lines, but not the environment
            environment[URI_VARIABLE] = self.uri
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_private(self._log), "ab") as out:
                self._process = subprocess.Popen(
                    [*bootstrap.command("trainer.commands.sync"), "follow", json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    env=environment,
                    start_new_session=True,  # Ctrl-C must reach only the trainer
                )
        except OSError as error:
            logger.warning("MLflow: the sender could not be started: %s", error)

    def finish(self, timeout_s: float = 20.0) -> Finished:
        """Give the sender at most ``timeout_s`` to send the rest, then end it."""
        process, self._process = self._process, None
        code: int | None = None
        if process is not None:
            with contextlib.suppress(OSError):  # it has ended already
                assert process.stdin is not None
                process.stdin.write(f"finish {timeout_s}\n".encode())
                process.stdin.close()
            try:
                code = process.wait(timeout_s + 1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return self._result(is_complete=code == 0)

    def has_unsent(self) -> bool:
        """Whether the store lacks anything of a run that has ended, according to tracking.json."""
        return not self._result(is_complete=False).complete

    @property
    def is_local(self) -> bool:
        """Whether the store is a file, which can be slow but not unreachable."""
        try:
            return self._target().database is not None
        except BadInput:
            return True

    @property
    def num_prompts(self) -> int:
        return len(RunFiles(self.output_dir).prompts)

    def new_problem(self) -> str | None:
        """Return a problem of the sender that was not returned yet; checks every few seconds."""
        now = time.monotonic()
        if now < self._next_check:
            return None
        self._next_check = now + CHECK_SECONDS
        problem = self._problem()
        if problem in (None, self._reported):
            return None
        self._reported = problem
        return f"MLflow: {problem}. Training continues; all numbers are kept in metrics.jsonl"

    def _problem(self) -> str | None:
        if self._process is None or self._process.poll() is not None:
            try:
                self._target()
            except BadInput as error:
                return redact(str(error))
            return f"the sender has ended; reasons are in {for_shell(self._log)}"
        return ProgressFile(self.output_dir).problem

    def _target(self) -> StoreAddress:
        return resolve(self.output_dir, self.uri)

    def _result(self, *, is_complete: bool) -> Finished:
        again = sync_command(self.output_dir)
        try:
            target = self._target()
            pusher = Pusher(self.output_dir, target)
            unsent = "" if is_complete else pusher.unsent()
            again = sync_later(self.output_dir, target.name, pusher.folder.tracking.uri)
        except (BadInput, OSError) as error:
            return Finished(False, f"MLflow: {redact(str(error))}; then: {again}")
        if not unsent:
            lacks = f"\nnote: {pusher.progress.lacks}" if pusher.progress.lacks else ""
            return Finished(True, where_to_look(target, pusher.progress.page) + lacks)
        why = f" ({pusher.state.problem})" if pusher.state.problem else ""
        return Finished(
            False,
            f"MLflow ({target.name}) is missing {unsent}{why}, which are kept locally. Upload "
            f"with: {again} (reasons in {for_shell(self._log)})",
        )


def sync_later(output_dir: Path, name: str, saved: str | None) -> str:
    """Return the command that sends the rest later.

    The command contains the ``name`` of the store only if ``resolve`` would not choose or not trust
    it, given the ``saved`` address of ``run.yaml``.
    """
    if saved and HIDDEN in saved and scheme_of(saved) not in HTTP:
        return sync_command(output_dir)  # sync then requires the address with its password
    try:
        later = resolve(output_dir, saved=saved)
        is_chosen = later.name == name and later.trusted
    except BadInput:
        is_chosen = False
    return sync_command(output_dir, None if is_chosen else name)
