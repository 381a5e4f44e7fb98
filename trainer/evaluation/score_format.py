"""Format validation scores: names, intervals and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.evaluation.statistics import RATES, STANDARD_ERROR, normal_interval, wilson_interval

#: Suffix of a distilled prompt's loss, which is not comparable with a cross-entropy.
DIVERGENCE = "_KL_divergence"
PREFIXES = ("validation_", "shifted_validation_")


def shown_scores(scores: Mapping[str, Any], distilled: bool) -> dict[str, float]:
    """Select validation scores; the loss of a distilled prompt is renamed to a divergence."""

    def name(key: str) -> str:
        renamed = distilled and key.removesuffix(STANDARD_ERROR).endswith("_loss")
        return key.replace("_loss", DIVERGENCE) if renamed else key

    return {
        name(key): float(value)
        for key, value in scores.items()
        if key.startswith(PREFIXES) and isinstance(value, int | float)
    }


def is_loss(key: str) -> bool:
    """Whether a score is in nats; all others are between 0 and 1."""
    return key.endswith(("loss", DIVERGENCE))


def score_interval(
    scores: Mapping[str, float], key: str, num_rows: Mapping[str, int]
) -> tuple[float, float] | None:
    """Compute the 95% interval of a score: Wilson for rates over rows, else normal.

    Args:
        num_rows: scored rows of each split.

    Returns:
        None if the number of rows or the standard error is unknown.
    """
    value = scores.get(key)
    if value is None or not math.isfinite(value):
        return None
    split, _, metric = key.rpartition("validation_")
    rows = num_rows.get(f"{split}validation")
    if metric in RATES:
        return wilson_interval(value, rows) if rows else None
    error = scores.get(key + STANDARD_ERROR, math.nan)
    if not math.isfinite(error):
        return None
    if error == 0 and rows and not is_loss(key):  # all rows correct, or all wrong
        return wilson_interval(value, rows)
    low, high = normal_interval(value, error)
    return (max(0.0, low), high if is_loss(key) else min(1.0, high))


def score_text(scores: Mapping[str, float], key: str, num_rows: Mapping[str, int]) -> str:
    """Format a score with its 95% interval if known; a dash if there is no score."""
    return format_with_interval(key, scores.get(key), score_interval(scores, key, num_rows))


def format_score(key: str, value: float | None) -> str:
    """Format a loss in nats with four digits, any other score in percent."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if is_loss(key) else f"{100 * value:.1f}%"


def format_with_interval(
    key: str, value: float | None, interval: tuple[float, float] | None
) -> str:
    """Format a score with its 95% interval: ``68.3% (55.8–78.7)``."""
    text = format_score(key, value)
    if interval is None:
        return text
    low, high = (f"{x:.4f}" if is_loss(key) else f"{100 * x:.1f}" for x in interval)
    return f"{text} ({low}–{high})"


def format_difference(key: str, value: float) -> str:
    """Format a difference: ``+5.0`` points of a rate or ``-0.1234`` nats of a loss."""
    return f"{value:+z.4f}" if is_loss(key) else f"{100 * value:+z.1f}"


def column_title(key: str) -> str:
    """Title of a column: ``accuracy``, ``OOD accuracy``, ``macro F1``, ``KL divergence``."""
    name = key.removeprefix("shifted_").removeprefix("validation_")
    name = name.replace("_", " ").replace("f1", "F1")
    return f"OOD {name}" if key.startswith("shifted_") else name


def describe(scores: Mapping[str, float], metric: str, num_rows: Mapping[str, int]) -> str:
    """Format the task's metric and the losses with 95% intervals, in one line."""
    names = [f"validation_{metric}", f"shifted_validation_{metric}"]
    names += ["validation_loss", f"validation{DIVERGENCE}", "validation_agreement"]
    shown = [name for name in dict.fromkeys(names) if name in scores]
    return ", ".join(f"{column_title(name)} {score_text(scores, name, num_rows)}" for name in shown)
