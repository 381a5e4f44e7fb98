"""Text encoders as they were at their best validation: what reads new texts after the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

#: Gives the weights of a reader as they are judged, by their own names.
Judged = Callable[[], Mapping[str, Tensor]]


class BestReader:
    """Keeps one copy of a reader: that of the least validation loss, the mean of its prompts'.

    A prompt that has stopped counts with its last loss, so that the others' go on being comparable.
    Without any validation the newest is the best we know.

    Args:
        judged: called only when the reader is better than before.
    """

    def __init__(self, judged: Judged) -> None:
        self._judged = judged
        self._step, self._loss = 0, math.inf
        self._losses: dict[str, float] = {}
        self._weights: dict[str, Tensor] = {}

    def update(self, step: int, losses: Mapping[str, float | None]) -> None:
        """Keep the reader as it is now, if it is better.

        Args:
            losses: of its prompts that were validated after ``step``; None: without validation.
        """
        found = {name: loss for name, loss in losses.items() if loss is not None}
        if not all(map(math.isfinite, found.values())):
            return
        self._losses |= found
        mean = sum(self._losses.values()) / len(self._losses) if self._losses else math.inf
        if mean < self._loss or not self._losses:
            self._step, self._loss = step, mean
            weights = self._judged()
            self._weights = {
                name: value.detach().to("cpu", copy=True) for name, value in weights.items()
            }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights by name, which nobody writes to any more, and JSON with their ``step``."""
        return dict(self._weights), {
            "step": self._step,
            "loss": self._loss,
            "losses": dict(self._losses),
        }

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self._weights = {name: value.clone() for name, value in tensors.items()}
        self._step, self._loss = int(meta["step"]), float(meta["loss"])
        self._losses = dict(meta["losses"])
