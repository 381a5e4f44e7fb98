"""Checkpoints are written by a thread while training continues.

A step is held up only while its state is copied. One checkpoint is written at a time. While it is,
the newest snapshot waits in line and takes the place of one that waits there already, so that a
slow disk makes checkpoints rarer, and never a step longer.
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
    """The checkpoints of a run, for use in a ``with``: at its end, all that was asked is written.

    Args:
        keep: newest checkpoints that are kept.
        warn: told of what went wrong, by ``tell``, in the thread that trains.
        check: raises where the folder is no longer ours to write to; called before each write.

    Attributes:
        newest: the newest checkpoint that is on disk, of those of this process.
        seconds: in which training waited for ``save``.
        write_seconds: in which the thread wrote.
        failed: what went wrong, by the step of its checkpoint.
        replaced: snapshots that gave way to a newer one before they were written.
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
        self._untold: list[str] = []
        self._waiting: Snapshot | None = None
        self._lock = threading.Condition()
        self._writing = False

    def save(self, take: Callable[[], Snapshot]) -> None:
        """Copy the state now, have it written soon."""
        started = time.perf_counter()
        taken = take()
        with self._lock:
            self.replaced += self._waiting is not None
            self._waiting = taken
            if not self._writing:
                self._writing = True
                # A thread of its own for each row of writes: none idles, and none is left to end.
                threading.Thread(target=self._write, name="checkpoint", daemon=True).start()
        self.seconds += time.perf_counter() - started

    def tell(self) -> None:
        """Say what went wrong since the last time; called between steps."""
        with self._lock:
            untold, self._untold = self._untold, []
        for text in untold:
            self._warn(text)

    def wait(self) -> None:
        """Until all that was asked is on disk, or has failed; a second Ctrl-C does not end it."""
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                with self._lock:
                    self._lock.wait_for(lambda: not self._writing)
                break
            except KeyboardInterrupt as error:
                interrupted = error
        self.tell()
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
        """For the summary.

        Args:
            train_seconds: of this process.
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
        while True:
            with self._lock:
                taken, self._waiting = self._waiting, None
                if taken is None:
                    self._writing = False
                    self._lock.notify_all()
                    return
            started = time.perf_counter()
            path, why = self._try(taken)
            with self._lock:
                self.write_seconds += time.perf_counter() - started
                if path is not None:
                    self.newest = path
                    self.written += 1
                else:
                    self.failed[taken.step] = why
                    self._note(
                        f"step {taken.step}: no checkpoint written: {why}; training continues"
                    )

    def _try(self, taken: Snapshot) -> tuple[Path | None, str]:
        """Where it was written, or why it was not."""
        try:
            self._check()
            return checkpoint.write(self.folder, taken, self._keep, self._note), ""
        except OSError as error:
            return None, str(error)
        except Exception as error:  # the thread must not end without a word
            return None, f"{type(error).__name__}: {error}"

    def _note(self, text: str) -> None:
        with self._lock:
            self._untold.append(text)
