"""The trainer's hold on the sidecar. Nothing here waits for a tracker, and nothing here raises."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.config import PROJECT_ROOT
from trainer.errors import BadInput
from trainer.redact import redact

logger = logging.getLogger(__name__)
URI_VARIABLE = "PROMPTSHARD_TRACKING_URI"


@dataclass(frozen=True)
class Finished:
    """What ``Sender.finish`` found."""

    complete: bool
    message: str  #: for a person: where to look, or what is unsent and how to send it


class Sender:
    """Starts ``python -m trainer.tracking follow``, which tails ``metrics.jsonl`` into MLflow.

    Use it on one rank only. Before ``start``: ``run.yaml``, ``environment.json`` and
    ``datasets.json`` are written and ``metrics.jsonl`` is rewound. Before ``finish``:
    ``summary.json``, ``report.html`` and ``prompts/`` are.

    Args:
        uri: ``tracking.uri`` as the person wrote it, with credentials: the copy in ``run.yaml``
            has none. Handed on by environment, never by command line.
        every: seconds between two rounds of sending.
        grace: seconds the sidecar may go on sending when the trainer is gone.
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

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the sidecar; if that cannot be, training goes on and ``finish`` says so."""
        options = {
            "output_dir": str(self.output_dir),
            "parent": os.getpid(),
            "stale_summary_ns": _mtime_ns(self.output_dir / "summary.json"),
            "every": self.every,
            "grace": self.grace,
        }
        try:
            log = self.output_dir / "logs" / "tracking.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as out:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "trainer.tracking", "follow", json.dumps(options)],
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

    def _result(self, complete: bool) -> Finished:
        # Late imports: the training process needs none of this while it trains.
        from trainer.tracking.state import State
        from trainer.tracking.sync import Pusher, where_to_look
        from trainer.tracking.target import resolve

        again = f"promptshard sync {_quoted(self.output_dir)}"
        try:
            target = resolve(self.output_dir, self.uri)
            pusher = Pusher(self.output_dir, target, State(self.output_dir))
            if complete:
                return Finished(True, where_to_look(target, pusher.progress.page))
            unsent = pusher.unsent()
        except (BadInput, OSError) as error:
            return Finished(False, f"MLflow: {redact(str(error))}; then: {again}")
        if not unsent:
            return Finished(True, where_to_look(target, pusher.progress.page))
        return Finished(
            False,
            f"MLflow: {target.name} has not got {unsent}; nothing is lost. Send it with: {again} "
            f"(reasons in {_quoted(self.output_dir / 'logs' / 'tracking.log')})",
        )

    def _environment(self) -> dict[str, str]:
        """One thread and our own package; the address where ``ps`` does not show it."""
        environment = dict(os.environ)
        paths = [str(PROJECT_ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"
        environment.pop(URI_VARIABLE, None)
        if self.uri:
            environment[URI_VARIABLE] = self.uri
        return environment


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
