"""Names, intervals and text of validation scores, the same on the terminal, the page and MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.evaluation.statistics import RATES, STANDARD_ERROR, normal_interval, wilson_interval

#: Ending of the loss of a distilled prompt where it is shown beside cross-entropies.
DIVERGENCE = "_KL_divergence"
PREFIXES = ("validation_", "shifted_validation_")


def shown_scores(scores: Mapping[str, Any], distilled: bool) -> dict[str, float]:
    """Keep the scores of a result; the loss of a distilled prompt gets the name of a divergence."""

    def name(key: str) -> str:
        for ending in ("_loss", f"_loss{STANDARD_ERROR}"):
            if distilled and key.endswith(ending):
                return key.removesuffix(ending) + DIVERGENCE + ending.removeprefix("_loss")
        return key

    return {
        name(key): float(value)
        for key, value in scores.items()
        if key.startswith(PREFIXES) and isinstance(value, int | float)
    }


def is_loss(key: str) -> bool:
    """Whether a score is in nats; others are between 0 and 1."""
    return key.endswith(("loss", DIVERGENCE))


def score_interval(
    scores: Mapping[str, float], key: str, num_rows: Mapping[str, int]
) -> tuple[float, float] | None:
    """95% interval of a score: Wilson's for rates over rows, else normal; None if unknown.

    Args:
        num_rows: scored rows of each split.
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
    if error == 0 and rows and not is_loss(key):  # all rows right or all wrong, as F1 of 100%
        return wilson_interval(value, rows)
    low, high = normal_interval(value, error)
    return (max(0.0, low), high if is_loss(key) else min(1.0, high))


def score_text(scores: Mapping[str, float], key: str, num_rows: Mapping[str, int]) -> str:
    """A score with its 95% interval where it is known; a dash where there is no score."""
    return format_with_interval(key, scores.get(key), score_interval(scores, key, num_rows))


def format_score(key: str, value: float | None) -> str:
    """Losses in nats with four digits, everything else in percent."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if is_loss(key) else f"{100 * value:.1f}%"


def format_with_interval(
    key: str, value: float | None, interval: tuple[float, float] | None
) -> str:
    """``68.3% (55.8–78.7)``: a score with its 95% interval."""
    text = format_score(key, value)
    if interval is None:
        return text
    low, high = interval
    return text + (
        f" ({low:.4f}–{high:.4f})" if is_loss(key) else f" ({100 * low:.1f}–{100 * high:.1f})"
    )


def format_difference(key: str, value: float) -> str:
    """``+5.0`` points of a rate, or ``-0.1234`` nats of a loss."""
    return f"{value:+.4f}" if is_loss(key) else f"{100 * value:+.1f}"


def column_title(key: str) -> str:
    """What a column is called: ``accuracy``, ``OOD accuracy``, ``macro F1``, ``KL divergence``."""
    name = key.removeprefix("shifted_").removeprefix("validation_").replace("_", " ")
    name = name.replace("f1", "F1")
    return f"OOD {name}" if key.startswith("shifted_") else name


def describe(scores: Mapping[str, float], metric: str, num_rows: Mapping[str, int]) -> str:
    """Return the task's metric and the losses, with 95% intervals, in one line for people.

    Args:
        num_rows: scored rows of each split.
    """
    names = [f"validation_{metric}", f"shifted_validation_{metric}"]
    names += ["validation_loss", f"validation{DIVERGENCE}", "validation_agreement"]
    shown = [name for name in dict.fromkeys(names) if name in scores]
    return ", ".join(f"{column_title(name)} {score_text(scores, name, num_rows)}" for name in shown)
