"""The texts of one row as a tree of segments: a beginning that several texts share occurs once.

Two kinds of rows have several texts. A row with candidate targets is scored with each of them after
the same input. A dialogue whose chat template rewrites earlier turns has one text per learned turn
(``Example.branches``). In both, a segment attends to itself and to the segments that it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from trainer.data.token_table import Example

#: ``TreeSegment.parent`` of segments that continue the prompt's segment, or nothing.
ROOT = -1


@dataclass(frozen=True)
class TreeSegment:
    """Consecutive tokens of a tree, ``token_ids[start:stop]``.

    Attributes:
        parent: index of the segment that this one continues; ``ROOT``: what precedes the tree.
        sibling: one of several short segments with this parent, which are consecutive.
    """

    start: int
    stop: int
    parent: int = ROOT
    sibling: bool = False


@dataclass(frozen=True)
class Target:
    """Labels whose losses are summed in one slot.

    Attributes:
        positions: index of the token whose output predicts each label; -1: the token before the
            tree.
    """

    positions: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class TokenTree:
    """Tokens of all segments, in their order, and the targets that they predict."""

    token_ids: tuple[int, ...]
    segments: tuple[TreeSegment, ...]
    targets: tuple[Target, ...]


def tree_of(example: Example, leading: int) -> TokenTree:
    """Return the tree of a row with one target, which may have branches.

    Args:
        leading: number of leading tokens that precede the tree, in the prompt's segment.
    """
    ids = example.input_ids[leading:]
    if not example.branches:
        positions = _predicting(example, leading)
        return TokenTree(ids, (TreeSegment(0, len(ids)),), (Target(positions, _labels(example)),))
    segments = list[TreeSegment]()
    ends = {leading: ROOT}  # number of tokens of the trunk -> index of the segment that ends there
    edges = sorted({shared for _, shared in example.branches} | {leading, example.trunk_length})
    assert edges[0] == leading, "branches continue the segment of the prompt"
    for start, stop in pairwise(edges):
        segments.append(TreeSegment(start - leading, stop - leading, ends[start]))
        ends[stop] = len(segments) - 1
    starts = [*(start for start, _ in example.branches), example.num_tokens]
    for (start, shared), stop in zip(example.branches, starts[1:], strict=True):
        segments.append(TreeSegment(start - leading, stop - leading, ends[shared]))
    positions = _predicting(example, leading, dict(example.branches))
    return TokenTree(ids, tuple(segments), (Target(positions, _labels(example)),))


def tree_of_candidates(candidates: Sequence[Example], leading: int) -> TokenTree:
    """Return the tree of a row with several targets: their common tokens, then each one's own.

    The last token of a candidate predicts nothing and is omitted.

    Args:
        leading: as in ``tree_of``.
    """
    if candidates[0].branches:
        assert len(candidates) == 1, "candidates differ in the last turn only"
        return tree_of(candidates[0], leading)
    read = [example.input_ids[leading : example.label_spans[-1][1] - 1] for example in candidates]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*read, strict=False))
    shared = sum(1 for _ in same)
    token_ids, segments, targets = list(read[0][:shared]), list[TreeSegment](), list[Target]()
    if shared:
        segments.append(TreeSegment(0, shared))
    parent = len(segments) - 1
    for example, ids in zip(candidates, read, strict=True):
        start = len(token_ids)
        if len(ids) > shared:
            token_ids += ids[shared:]
            segments.append(TreeSegment(start, len(token_ids), parent, sibling=True))
        positions = tuple(
            at if at < shared else at - shared + start for at in _predicting(example, leading)
        )
        targets.append(Target(positions, _labels(example)))
    return TokenTree(tuple(token_ids), tuple(segments), tuple(targets))


def _labels(example: Example) -> tuple[int, ...]:
    return tuple(i for first, stop in example.label_spans for i in example.input_ids[first:stop])


def _predicting(
    example: Example, leading: int, continued: dict[int, int] | None = None
) -> tuple[int, ...]:
    """Return the index of the token before each label.

    Args:
        continued: start of each branch -> number of tokens of the trunk that it continues.
    """
    before = continued or {}
    return tuple(
        place - 1 - leading
        for first, stop in example.label_spans
        for place in (before.get(first, first), *range(first + 1, stop))
    )
