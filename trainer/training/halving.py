"""Halving of a run's prompts and selection of the best one: pure functions of their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

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
