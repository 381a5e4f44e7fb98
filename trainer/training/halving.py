"""Halving of a run's prompts and selection of the best one: pure functions of their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from trainer.config import LOWER_IS_BETTER
from trainer.config.ranking import AnyEntry, rank
from trainer.config.run import Halving

#: Sort key of a prompt at a rung; smaller is better.
RungKey = tuple[float, ...]


def rungs(halving: Halving | None, last_step: int) -> frozenset[int]:
    """Steps before the last one at which prompts are compared: first, first * eta, ..."""

    def steps() -> Iterator[int]:
        step = halving.first if halving else last_step
        while halving and step < last_step:
            yield step
            step *= halving.eta

    return frozenset(steps())


def worst(keys: Mapping[int, RungKey], eta: int) -> list[int]:
    """Return the prompts that a rung eliminates: all but the best ceil(n / eta) of n, in order.

    Of equal ones the first stays. Source: successive halving, Algorithm 1 of arXiv 1810.05934
    (which keeps floor(n / eta)).

    Args:
        keys: sort key of each prompt, smaller is better; see ``ranking.score_key``.
    """
    stay = math.ceil(len(keys) / eta)
    ranked = sorted(keys, key=lambda k: (keys[k], k))
    return sorted(ranked[stay:])


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
