"""Learning-rate schedules: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_decay(progress: float) -> float:
    """Half a cosine from 1 to 0, as in transformers' ``get_cosine_schedule_with_warmup``."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def linear_decay(progress: float) -> float:
    """Decay linearly from 1 to 0, as in transformers' ``get_linear_schedule_with_warmup``."""
    return max(0.0, 1.0 - progress)


#: Factor of the learning rate, as a function of the share of updates made after warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": linear_decay,
    "cosine": cosine_decay,
}


def learning_rate_factor(
    schedule: str, update: int, num_warmup_updates: int, num_updates: int
) -> float:
    """Return the factor of the learning rate: linear warm-up to 1, then the schedule.

    Warm-up begins above 0, unlike in transformers, where the first update changes nothing.

    Args:
        update: number of updates made before this one.
    """
    if update < num_warmup_updates:
        return (update + 1) / (num_warmup_updates + 1)
    progress = (update - num_warmup_updates) / max(1, num_updates - num_warmup_updates)
    return SCHEDULES[schedule](progress)
