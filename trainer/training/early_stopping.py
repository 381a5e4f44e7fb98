"""Early stopping of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.ranking import LAST, ScoreKey


class EarlyStopping:
    """Tracks a prompt's best validation, and decides when the prompt stops.

    Args:
        patience: evaluations in a row without improvement until ``should_stop``; None: never.

    Attributes:
        best: ``ranking.score_key`` of the best scores so far; None before the first finite scores.
        best_step: step of these scores.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience
        self.best: ScoreKey | None = None
        self.best_step: int | None = None
        self._waited = 0

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self._waited >= self.patience

    def update(self, step: int, key: ScoreKey) -> bool:
        """Record one evaluation; return whether it is the best so far (never for ``LAST``)."""
        improved = key != LAST and (self.best is None or key < self.best)
        if improved:
            self.best, self.best_step, self._waited = key, step, 0
        else:
            self._waited += 1
        return improved

    def state_dict(self) -> dict[str, Any]:
        """Return the state without ``best``, which follows from the scores at ``best_step``.

        ``patience`` belongs to the run file and may change on resume.
        """
        return {"best_step": self.best_step, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``; the caller sets ``best``."""
        self.best_step, self._waited = state["best_step"], state["waited"]
