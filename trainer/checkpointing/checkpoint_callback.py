"""Save the state of the training loop, and check the output folder between steps."""

from __future__ import annotations

from collections.abc import Callable

from trainer.checkpointing.async_writer import AsyncCheckpointWriter
from trainer.checkpointing.checkpoint import Snapshot
from trainer.checkpointing.output_folder import OutputFolder
from trainer.checkpointing.run_lock import Lock
from trainer.training.callbacks import Callback, StepReport


class CheckpointCallback(Callback):
    """Writes checkpoints on rank 0."""

    def __init__(
        self,
        writer: AsyncCheckpointWriter,
        lock: Lock,
        folder: OutputFolder,
        take_snapshot: Callable[[], Snapshot],
        warn: Callable[[str], None],
    ) -> None:
        self._writer, self._lock, self._folder = writer, lock, folder
        self._take_snapshot, self._warn = take_snapshot, warn

    def on_step_end(self, report: StepReport) -> None:
        self._writer.report_problems()
        self._lock.check()
        self.check_folder()

    def on_checkpoint(self) -> None:
        self._writer.save(self._take_snapshot)

    def check_folder(self, *, now: bool = False) -> None:
        """Check that the output folder still exists; see ``OutputFolder.check``."""
        self._folder.check(self._warn, self.on_checkpoint, self._writer.wait, now=now)
