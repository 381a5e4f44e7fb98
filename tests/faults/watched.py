"""The instrumented trainer: ``python -m tests.faults.watched NOTES.jsonl WHERE RUN.yaml ...``.

Rank 0 logs the rows of every step, the digest of the base before and after it, and whether the
base has gradients. ``WHERE`` (``STEP:BATCH`` or ``never``) is where every rank kills itself with
SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trainer.__main__
import trainer.training.loop
from tests.base_digest import base_digest
from trainer.runtime.process import flush_and_exit
from trainer.training.loop import Loop


class Watch:
    """Records one run."""

    def __init__(self, notes: Path, where: str) -> None:
        self.notes = notes
        self.die_at = None if where == "never" else tuple(map(int, where.split(":")))
        self.loop: Loop | None = None
        self.batches = 0

    def note(self, **what: Any) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            with self.notes.open("a") as file:
                file.write(json.dumps(what) + "\n")

    def note_base(self) -> None:
        assert self.loop is not None
        base = self.loop.evaluator.base
        parameters = list(base.parameters())
        self.note(
            digest=base_digest(base),
            trainable=sum(p.requires_grad for p in parameters),
            with_gradient=sum(p.grad is not None for p in parameters),
        )

    def before_forward(self, base: Any, arguments: Any) -> None:
        import torch

        if not torch.is_grad_enabled() or self.loop is None:
            return
        self.batches += 1
        if self.die_at == (self.loop.progress.step + 1, self.batches):
            # Wait for the checkpoint before, which a thread writes.
            every = self.loop.config.checkpoint.every
            last = self.loop.progress.step // every * every
            path = Path(self.loop.config.output_dir) / "checkpoints" / f"step-{last:08d}"
            while not path.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    watch = Watch(Path(arguments[0]), arguments[1])
    run, next_batch, gradients = Loop.run, Loop._next_batch, trainer.training.loop.batch_gradients

    def watched_run(loop: Loop) -> None:
        watch.loop = loop
        loop.evaluator.base.register_forward_pre_hook(watch.before_forward)
        watch.note_base()
        run(loop)
        watch.note_base()

    def watched_batch(loop: Loop, lengths: Any) -> Any:
        step_batch = next_batch(loop, lengths)
        rows = [(packed_row.prompt, int(packed_row.example.row)) for packed_row in step_batch.rows]
        watch.note(step=loop.progress.step + 1, rows=rows, batches=len(step_batch.plan))
        watch.batches = 0
        return step_batch

    def watched_gradients(*given: Any) -> Any:
        result = gradients(*given)
        watch.note_base()
        return result

    Loop.run, Loop._next_batch = watched_run, watched_batch  # type: ignore[method-assign]
    trainer.training.loop.batch_gradients = watched_gradients  # type: ignore[assignment]
    return trainer.__main__.main(arguments[2:])


if __name__ == "__main__":
    flush_and_exit(main(sys.argv[1:]))
