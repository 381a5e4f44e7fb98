"""kNN prompting: classify a row by the train rows with the most similar next-token distribution.

Source: Xu et al. 2023, kNN Prompting (arXiv 2303.13824). The distance from a row to an anchor is
``KL(p_row || p_anchor)`` of the distributions over the vocabulary at the place of the answer.

Shape letters: R rows, A anchors, V vocabulary, C choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.read_texts import next_token_log_probabilities

#: Rows whose distances to all anchors are computed together.
ROWS = 256


@dataclass(frozen=True)
class Anchors:
    """Distributions of train rows, equal on all ranks.

    Attributes:
        log_AV: log-probabilities, in half precision.
        labels: index of the correct choice of every anchor.
    """

    log_AV: Tensor
    labels: Sequence[int]


def read_anchors(
    evaluator: Evaluator,
    inputs: Sequence[Sequence[int]],
    labels: Sequence[int],
    advance: Callable[[float], None],
) -> Anchors:
    """Compute the distributions of train rows; a collective."""
    indices, log_RV = next_token_log_probabilities(evaluator, inputs, advance)
    log_AV = torch.empty(len(inputs), log_RV.shape[1], dtype=torch.half)
    for of_rank, values in evaluator.engine.all_gather((indices, log_RV.half())):
        log_AV[of_rank] = values
    return Anchors(log_AV, labels)


def nearest(
    evaluator: Evaluator,
    inputs: Sequence[Sequence[int]],
    anchors: Anchors,
    excluded: Sequence[Sequence[int]],
    neighbors: int,
    advance: Callable[[float], None],
) -> list[list[int]]:
    """Return the nearest anchors of every row, the nearest first, on all ranks; a collective.

    Args:
        excluded: anchors of every row that are not used, because they are the same row.
    """
    indices, log_RV = next_token_log_probabilities(evaluator, inputs, advance)
    mine: dict[int, list[int]] = {}
    for start in range(0, len(indices), ROWS):
        rows, part_RV = indices[start : start + ROWS], log_RV[start : start + ROWS]
        # The entropy of the row is the same for all anchors.
        distance_RA = -(part_RV.exp() @ anchors.log_AV.float().T)
        for row, distance_A in zip(rows, distance_RA, strict=True):
            distance_A[list(excluded[row])] = torch.inf
            mine[row] = distance_A.topk(neighbors, largest=False).indices.tolist()
    merged = {row: near for part in evaluator.engine.all_gather(mine) for row, near in part.items()}
    return [merged[row] for row in range(len(inputs))]


def votes(nearest_labels: Sequence[int], choices: int) -> tuple[int, list[float]]:
    """Return the majority of the neighbors' labels, and the share of each choice.

    If several choices have the same share, the one of the nearest neighbor among them is predicted.
    """
    shares = [nearest_labels.count(c) / len(nearest_labels) for c in range(choices)]
    most = max(shares)
    return next(label for label in nearest_labels if shares[label] == most), shares
