"""Choices that are a prefix of another choice, such as "net" and "network", without EOS after them.

The text "network" begins with "net", so every base predicts "net" at least as likely as "network".
The likelihoods are made exclusive: that of a choice is the probability of text that begins with it
and with no longer choice,

    P(net, not network) = P(net) - P(network).

So the longer choice wins exactly where the base prefers to continue with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from trainer.data.token_table import Example

#: Smallest probability that a choice ends where a longer one continues: rounding error of fp32.
LEAST = 1e-12

Labels = tuple[tuple[int, ...], ...]


def labels_of(candidates: Sequence[Example]) -> Labels:
    """Token ids of the targets of one row's candidates."""
    return tuple(c.input_ids[c.target_start :] for c in candidates)


@lru_cache(maxsize=4096)
def continuations(labels: Labels) -> tuple[tuple[int, ...], ...]:
    """For each target, the indices of the longer ones that begin with it.

    One that begins with another of them is omitted: its probability is included in that one's.
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
    """Negative log-likelihood [R, C] without text that continues as a longer candidate.

    Args:
        nll_RC: of each of C candidates of each of R rows, in nats, float64.
        rows: the candidates of each row.
    """
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
    """Indices (shorter, longer) of choices of which one is a prefix of the other in some row."""
    return {
        (choice, other)
        for labels in {labels_of(candidates) for candidates in rows}
        for choice, longer in enumerate(continuations(labels))
        for other in longer
    }
