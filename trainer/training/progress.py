"""Progress of a run: the counters and scores that every checkpoint contains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Scores = dict[str, float]


@dataclass
class TrainingProgress:
    """Counters and scores of a run.

    Attributes:
        prompt_tokens: useful tokens that each prompt has read.
        data_wait_seconds: part of ``train_seconds`` spent waiting for the next batch.
        scores: of each prompt at its best validation, by metric name.
        skipped: skipped updates of each prompt, in total and in a row.
        stopped: for each stopped prompt the ``step`` and the ``reason``: ``finished`` (all steps
            done), ``early_stopping``, ``halving`` or ``diverged``.
        train_losses: sum and number of each prompt's losses since its last validation.
        unjudged: the last step is complete, but its validation and early stops are not.
        validations: number of steps after which prompts were validated.
        phase_seconds: of ``PhaseTimes``, over all processes of the run.
        rank_seconds: these seconds times the number of ranks, which can differ between starts; 0 in
            checkpoints of earlier versions.
    """

    step: int = 0
    useful_tokens: int = 0
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    train_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    baselines: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    stopped: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    unjudged: bool = False
    validations: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    rank_seconds: float = 0.0

    def end_step(self, names: Sequence[str], tokens: Sequence[int]) -> None:
        """Count a step, and the useful tokens that it read for each prompt."""
        self.step += 1
        self.unjudged = True
        self.useful_tokens += sum(tokens)
        for name, count in zip(names, tokens, strict=True):
            self.prompt_tokens[name] = self.prompt_tokens.get(name, 0) + count

    def add_train_loss(self, name: str, loss: float) -> None:
        """Add a finite loss to the mean since the prompt's last validation; ignore others."""
        if math.isfinite(loss):
            total, count = self.train_losses.get(name, (0.0, 0))
            self.train_losses[name] = (total + loss, count + 1)

    def mark_stopped(self, name: str, reason: str) -> None:
        """Record that a prompt has stopped after the current step."""
        self.stopped[name] = {"step": self.step, "reason": reason}
