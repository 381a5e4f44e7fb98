"""A packed batch with every kind of prefix, for comparing attention implementations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trainer.model.attention.bucket_layout import Scores
from trainer.model.attention.family_overrides import alibi_slopes
from trainer.model.attention.interface import Layout, attend, make_layout, with_flex, with_past
from trainer.packing.packed_batch import Segment

HEADS, SIZE = 4, 16
TOKENS, PAST = 5 + 3 + 7 + 150 + 4 + 20 + 6 + 2 + 1 + 3 + 4 + 2 + 2 + 1 + 4 + 3, [6, 2]
_FIRST, _SECOND = Segment(0, 5), Segment(5, 3)
_PAST = Segment(TOKENS, 6), Segment(TOKENS + 6, 2)
_ROWS = [Segment(8, 7, _FIRST), Segment(165, 4, _PAST[0]), Segment(189, 6)]
_BRANCH = Segment(210, 4, _ROWS[1])
# Two prompts of tokens, then rows: behind each of these, behind two prefixes, behind none; one is
# longer than a block of FlexAttention's. Then candidates of three of the rows, a branch of one, and
# a segment that continues the branch.
SEGMENTS = [
    _FIRST,
    _SECOND,
    _ROWS[0],
    Segment(15, 150, _SECOND),
    _ROWS[1],
    Segment(169, 20, _PAST[1]),
    _ROWS[2],
    Segment(195, 2, _ROWS[0], sibling=True),
    Segment(197, 1, _ROWS[0], sibling=True),
    Segment(198, 3, _ROWS[0], sibling=True),
    Segment(201, 4, _ROWS[1], sibling=True),
    Segment(205, 2, _ROWS[1], sibling=True),
    Segment(207, 2, _ROWS[2], sibling=True),
    Segment(209, 1, _ROWS[2], sibling=True),
    _BRANCH,
    Segment(214, 3, _BRANCH),
]
SCORES = {
    "plain": Scores(0.3),
    "window": Scores(0.3, window=4),
    "softcap": Scores(0.3, softcap=0.8),
    "softcap-window": Scores(0.3, window=6, softcap=0.8),
    "alibi": Scores(0.3, slopes=alibi_slopes(HEADS)),
    "alibi-rounded": Scores(
        0.3, slopes=alibi_slopes(HEADS), slope_dtype=torch.bfloat16, slope_scaling=0.3
    ),
}


def tensors(kv_heads: int, device: str = "cpu", value_size: int = SIZE) -> list[Tensor]:
    """Query, key, value, and the keys and values of each prefix in one layer.

    Args:
        value_size: where it is not that of keys there are no such prefixes: they hold both.
    """
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(1, HEADS, TOKENS, SIZE), (1, kv_heads, TOKENS, SIZE)]
    shapes += [(1, kv_heads, TOKENS, value_size)]
    if value_size == SIZE:
        shapes += [(n, 1, 2, kv_heads, SIZE) for n in PAST]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(device).requires_grad_() for tensor in drawn]


def attended(flex: bool, leaves: list[Tensor], scores: Scores) -> tuple[Tensor, list[Tensor]]:
    """Output [1, T, A, D] and the gradient of every leaf."""
    query, key, value, *past = leaves
    segments = SEGMENTS if past else [without_past(segment) for segment in SEGMENTS]
    layout: Layout = with_past(make_layout(segments, query.device), past)
    if flex:
        layout = with_flex(layout, segments)
    output = attend(query, key, value, layout, scores, 0)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output, list(torch.autograd.grad(output, leaves, upstream.to(query.device)))


def without_past(segment: Segment) -> Segment:
    if segment.prefix is None:
        return segment
    gone = segment.prefix.start >= TOKENS
    return replace(segment, prefix=None if gone else without_past(segment.prefix))
