"""Select a task's best prompt, and advise a shorter one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trainer.config import LOWER_IS_BETTER
from trainer.config.ranking import AnyEntry, Entry, rank
from trainer.evaluation.statistics import RATES, STANDARD_ERROR, rate_standard_error


def select(
    prompts: Sequence[AnyEntry], metric: str, standard_error: Callable[[AnyEntry], float]
) -> tuple[AnyEntry, AnyEntry | None] | None:
    """Return the best prompt, and the shortest of the shorter prompts within one standard error.

    Source: the one-standard-error rule of Breiman et al., Classification and Regression Trees
    (1984), 3.4.3, for lengths of prompts in place of sizes of trees.

    Args:
        prompts: prompts of one task, in the order of the run file.
        standard_error: returns the standard error of an entry's score in ``metric``, or NaN.

    Returns:
        None if no prompt can be ranked. The second item is None if there is no such prompt.
    """
    ranked = rank(prompts, metric)
    if not ranked:
        return None
    best, *others = ranked
    error = standard_error(best)
    key, sign = f"validation_{metric}", 1 if metric in LOWER_IS_BETTER else -1
    shorter = [
        entry
        for entry in others
        if entry.num_virtual_tokens < best.num_virtual_tokens
        and entry.eliminated <= best.eliminated
        and sign * (entry.scores[key] - best.scores[key]) <= (error if math.isfinite(error) else 0)
    ]
    return best, min(shorter, key=lambda entry: entry.num_virtual_tokens, default=None)


def standard_error(entry: Entry, metric: str, rows: int | None) -> float:
    """Standard error of an entry's score on validation rows; NaN if it is unknown."""
    key = f"validation_{metric}"
    if metric in RATES and rows:
        return rate_standard_error(entry.scores[key], rows)
    return float(entry.scores.get(key + STANDARD_ERROR, math.nan))


def best_and_other_length(
    prompts: Sequence[AnyEntry], metric: str, rows: int | None
) -> tuple[AnyEntry, AnyEntry | None] | None:
    """Return the best prompt, and a prompt of another length to compare it with.

    The other is the shortest one within one standard error, else the best one of another length;
    None if all prompts have one length.
    """
    selected = select(prompts, metric, lambda entry: standard_error(entry, metric, rows))
    if selected is None:
        return None
    best, shorter = selected
    others = (e for e in rank(prompts, metric) if e.num_virtual_tokens != best.num_virtual_tokens)
    return best, shorter or next(others, None)
