"""Likelihoods of choices that are a prefix of another choice ("net", "network") without EOS.

The text "network" begins with "net", so "net" is always at least as likely as "network". The
likelihoods are made exclusive: that of a choice is the probability of text that begins with this
choice but with no longer one:

    P(net, not network) = P(net) - P(network).

The longer choice is then predicted exactly if the base prefers to continue with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from trainer.data.token_table import Example

if TYPE_CHECKING:
    from torch import Tensor

#: Smallest probability that a choice ends where a longer one continues: rounding error of fp32.
LEAST = 1e-12

Labels = tuple[tuple[int, ...], ...]


def labels_of(candidates: Sequence[Example]) -> Labels:
    return tuple(c.input_ids[c.target_start :] for c in candidates)


@lru_cache(maxsize=4096)
def continuations(labels: Labels) -> tuple[tuple[int, ...], ...]:
    """Return, for each target, the indices of longer targets that begin with it.

    Those that begin with another target of the list are omitted: the probability of the latter
    includes them.
    """
    number = {ids: i for i, ids in enumerate(labels)}
    longer: list[list[int]] = [[] for _ in labels]
    for i, ids in enumerate(labels):
        shorter = (number.get(ids[:length]) for length in range(len(ids) - 1, 0, -1))
        longest = next((other for other in shorter if other is not None), None)
        if longest is not None:
            longer[longest].append(i)
    return tuple(map(tuple, longer))


def exclusive(nll_RC: Tensor, rows: Iterable[Sequence[Example]]) -> Tensor:
    """Exclude text that continues as a longer candidate from likelihoods; returns [R, C].

    Args:
        nll_RC: negative log-likelihood of C candidates of each of R rows, in nats, float64.
        rows: the candidates of each row.
    """
    import torch

    by_labels: dict[Labels, list[int]] = {}
    for row, candidates in enumerate(rows):
        by_labels.setdefault(labels_of(candidates), []).append(row)
    exclusive_RC = nll_RC.clone()
    for labels, numbers in by_labels.items():
        for choice, longer in enumerate(continuations(labels)):
            if longer:
                own_R = nll_RC[numbers, choice]
                rest_R = (-nll_RC[numbers][:, list(longer)]).logsumexp(1)
                # ln P(continues as a longer choice | the choice); clamped below 0 against rounding.
                share_R = (rest_R + own_R).clamp(max=-LEAST)
                exclusive_RC[numbers, choice] = own_R - torch.log(-torch.expm1(share_R))
    return exclusive_RC


def overlapping(rows: Iterable[Sequence[Example]]) -> set[tuple[int, int]]:
    """Return index pairs (shorter, longer) of choices: one is a prefix of the other in some row."""
    return {
        (choice, other)
        for labels in {labels_of(candidates) for candidates in rows}
        for choice, longer in enumerate(continuations(labels))
        for other in longer
    }
