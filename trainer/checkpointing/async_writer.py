"""Write checkpoints in a background thread while training continues.

A step waits only while its state is copied. One checkpoint is written at a time; meanwhile the
newest snapshot is queued and replaces one that is queued already. A slow disk therefore makes
checkpoints less frequent, never a step longer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import Snapshot


class AsyncCheckpointWriter:
    """Writes a run's checkpoints. As a context manager it waits at its end for all writes.

    Args:
        keep: number of newest checkpoints to keep.
        warn: called by ``report_problems``, in the training thread, for every failed write.
        check: called before each write; raises if the output folder is not this run's any more.

    Attributes:
        newest: the newest checkpoint that this process has written.
        seconds: time that training spent in ``save``.
        write_seconds: time that the thread spent writing.
        failed: error message by step of the checkpoint.
        replaced: snapshots that were replaced by a newer one before they were written.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        warn: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self._keep, self._warn, self._check = folder, keep, warn, check
        self.newest: Path | None = None
        self.seconds = self.write_seconds = 0.0
        self.written = self.replaced = 0
        self.failed: dict[int, str] = {}
        self._problems: list[str] = []
        self._queued: Snapshot | None = None
        self._lock = threading.Condition()
        self._writing = False

    def save(self, copy: Callable[[], Snapshot]) -> None:
        """Copy the state now and queue it for writing."""
        started = time.perf_counter()
        snapshot = copy()
        with self._lock:
            self.replaced += self._queued is not None
            self._queued = snapshot
            if not self._writing:
                self._writing = True
                # The thread ends when the queue is empty, so none is left to be stopped.
                threading.Thread(target=self._write, name="checkpoint", daemon=True).start()
        self.seconds += time.perf_counter() - started

    def report_problems(self) -> None:
        """Pass problems since the last call to ``warn``; called between steps."""
        with self._lock:
            problems, self._problems = self._problems, []
        for text in problems:
            self._warn(text)

    def wait(self) -> None:
        """Wait until every queued checkpoint is written or has failed.

        A Ctrl-C during the wait is raised only afterwards.
        """
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                with self._lock:
                    self._lock.wait_for(lambda: not self._writing)
                break
            except KeyboardInterrupt as error:
                interrupted = error
        self.report_problems()
        if interrupted is not None:
            raise interrupted

    def __enter__(self) -> AsyncCheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wait()

    def report(self, train_seconds: float) -> dict[str, Any]:
        """Return the numbers for ``summary.json``.

        Args:
            train_seconds: training time of this process.
        """
        return {
            "written": self.written,
            "replaced_by_newer": self.replaced,
            "failed": {str(step): why for step, why in self.failed.items()},
            "share_of_step_time": self.seconds / max(train_seconds, 1e-9),
            "held_up_seconds": self.seconds,
            "write_seconds": self.write_seconds,
        }

    def _write(self) -> None:
        """Write queued snapshots until there is none; the thread's function."""
        while True:
            with self._lock:
                snapshot, self._queued = self._queued, None
                if snapshot is None:
                    self._writing = False
                    self._lock.notify_all()
                    return
            started = time.perf_counter()
            path, why = self._try(snapshot)
            with self._lock:
                self.write_seconds += time.perf_counter() - started
                if path is not None:
                    self.newest = path
                    self.written += 1
                else:
                    self.failed[snapshot.step] = why
                    self._add_problem(
                        f"step {snapshot.step}: no checkpoint written: {why}; training continues"
                    )

    def _try(self, snapshot: Snapshot) -> tuple[Path | None, str]:
        """Return the written checkpoint, or None and the reason."""
        try:
            self._check()
            return checkpoint.write(self.folder, snapshot, self._keep, self._add_problem), ""
        except OSError as error:
            return None, str(error)
        except Exception as error:  # an exception would end the thread without a message
            return None, f"{type(error).__name__}: {error}"

    def _add_problem(self, text: str) -> None:
        with self._lock:
            self._problems.append(text)
