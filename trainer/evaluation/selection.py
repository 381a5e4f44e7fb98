"""Selection of a task's best prompt, with the advice of a shorter one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trainer.config import LOWER_IS_BETTER
from trainer.config.ranking import AnyEntry, rank


def select(
    prompts: Sequence[AnyEntry], metric: str, standard_error: Callable[[AnyEntry], float]
) -> tuple[AnyEntry, AnyEntry | None] | None:
    """Return the best prompt, and a shorter one within one standard error of it if there is one.

    The shorter one is advice: the shortest whose score is at most one standard error of the best
    below it. Source: the one-standard-error rule of Breiman et al., Classification and Regression
    Trees (1984), 3.4.3, for lengths of prompts in place of sizes of trees.

    Args:
        prompts: of one task, in the order of the run file.
        standard_error: of an entry's score in the task's metric; NaN where it is unknown.

    Returns:
        None if no prompt can be ranked.
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
