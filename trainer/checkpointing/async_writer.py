"""Write checkpoints in a background thread while training continues.

A step waits only while its state is copied. One checkpoint is written at a time, and at most one
snapshot is queued: a newer snapshot replaces it. A slow disk therefore makes checkpoints less
frequent, but does not delay steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import Snapshot


class AsyncCheckpointWriter:
    """Writes a run's checkpoints; a context manager that waits at its end for all writes.

    Args:
        warn: called by ``report_problems``, in the training thread, for every failed write.
        check: called before each write; raises if the output folder no longer belongs to this run.

    Attributes:
        newest: the newest checkpoint that this process has written.
        seconds: time spent in ``save``.
        write_seconds: time spent by the thread.
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
        self._problems: list[str] = []  # list methods are atomic
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._newest_write: Future[None] | None = None

    def save(self, copy: Callable[[], Snapshot]) -> None:
        """Copy the state now and queue it for writing."""
        started = time.perf_counter()
        snapshot = copy()
        if self._newest_write is not None and self._newest_write.cancel():  # it was still queued
            self.replaced += 1
        self._newest_write = self._executor.submit(self._write, snapshot)
        self.seconds += time.perf_counter() - started

    def report_problems(self) -> None:
        """Pass problems since the last call to ``warn``; called between steps."""
        while self._problems:
            self._warn(self._problems.pop(0))

    def wait(self) -> None:
        """Wait until every queued checkpoint is written or has failed.

        A Ctrl-C during the wait is raised only afterwards.
        """
        interrupted: KeyboardInterrupt | None = None
        while self._newest_write is not None:
            try:
                self._newest_write.result()
                self._newest_write = None
            except KeyboardInterrupt as error:
                interrupted = error
        self.report_problems()
        if interrupted is not None:
            raise interrupted

    def __enter__(self) -> AsyncCheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def report(self, train_seconds: float) -> dict[str, Any]:
        """Return the numbers for ``summary.json``, given the training time of this process."""
        return {
            "written": self.written,
            "replaced_by_newer": self.replaced,
            "failed": {str(step): why for step, why in self.failed.items()},
            "share_of_step_time": self.seconds / max(train_seconds, 1e-9),
            "held_up_seconds": self.seconds,
            "write_seconds": self.write_seconds,
        }

    def _write(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        try:
            self._check()
            self.newest = checkpoint.write(self.folder, snapshot, self._keep, self._problems.append)
            self.written += 1
        except Exception as error:
            why = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            self.failed[snapshot.step] = why
            self._problems.append(
                f"step {snapshot.step}: no checkpoint written: {why}; training continues"
            )
        self.write_seconds += time.perf_counter() - started
