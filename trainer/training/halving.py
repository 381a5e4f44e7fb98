"""Successive halving: the steps at which prompts are compared, and the prompts to stop.

Source: Algorithm 1 of arXiv 1810.05934, which keeps floor(n / eta) of n instead of the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from trainer.config import RunConfig
from trainer.config.ranking import ScoreKey
from trainer.config.training import Halving

#: Sort key of a prompt at a rung; smaller is better.
RungKey = tuple[float, ...]


def rungs(halving: Halving | None, last_step: int) -> frozenset[int]:
    """Return the steps before the last one at which prompts are compared: first, first * eta ..."""

    def steps() -> Iterator[int]:
        step = halving.first if halving else last_step
        while halving and step < last_step:
            yield step
            step *= halving.eta

    return frozenset(steps())


def split(keys: Mapping[int, RungKey], eta: int) -> tuple[list[int], list[int]]:
    """Return the best ceil(n / eta) of n prompts, from best to worst, and the others, in order.

    Among prompts with equal keys, earlier ones are kept.
    """
    stay = math.ceil(len(keys) / eta)
    ranked = sorted(keys, key=lambda k: (keys[k], k))
    return ranked[:stay], sorted(ranked[stay:])


def eliminated(
    config: RunConfig, keys: Mapping[int, ScoreKey]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Compare prompts at a rung, in groups of one task.

    Prompts that learn labels form one group, and prompts of each teacher another, because losses of
    different objectives are not comparable. Among equal scores, shorter prompts are better.

    Yields:
        Task, prompts to keep from best to worst, and prompts to stop, of every group in which any
        stop.
    """
    assert config.search.halving is not None
    groups: dict[tuple[str, str | None], dict[int, RungKey]] = {}
    for k, key in keys.items():
        prompt = config.prompts[k]
        group = groups.setdefault((prompt.task, prompt.teacher), {})
        group[k] = (*key, prompt.num_virtual_tokens)
    for (task, _), rivals in groups.items():
        kept, stopped = split(rivals, config.search.halving.eta)
        if stopped:
            yield task, kept, stopped
