"""Select a task's best prompt, and advise a shorter one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trainer.config import LOWER_IS_BETTER
from trainer.config.ranking import AnyEntry, rank


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
