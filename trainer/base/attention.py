"""Attention over a packed stream, plugged into transformers by name.

Each segment of the stream attends causally to itself and to the whole of its prefix segment. The
tokens stay packed in every linear layer; only here, segments are laid side by side in a few buckets
of similar length and handed to scaled-dot-product attention.

Shape letters: T tokens of a stream, S segments of a bucket, Q longest segment, P longest prefix,
A attention heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from trainer.tasks.streams import Segment

PACKED = "promptshard_packed"
# A bucket takes segments down to this share of its longest: less padding against fewer calls.
BUCKET_RATIO = 0.7


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, side by side.

    Attributes:
        query_SQ: where in the stream each query stands; padding repeats the segment's last token.
        key_SPQ: where each key stands, prefix first: [S, P + Q].
        mask: True where a query may look: [S, 1, Q, P + Q].
    """

    query_SQ: Tensor
    key_SPQ: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Layout:
    """How the segments of one stream attend; made once, used by every layer.

    Attributes:
        restore_T: for each token, its place among the outputs of all buckets laid end to end.
    """

    buckets: tuple[Bucket, ...]
    restore_T: Tensor


def make_layout(segments: Sequence[Segment], device: torch.device) -> Layout:
    """Group segments into buckets of similar length."""
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (-s.length, s.start)):
        if groups and segment.length >= BUCKET_RATIO * groups[-1][0].length:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    buckets = tuple(_bucket(group) for group in groups)

    num_tokens = sum(segment.length for segment in segments)
    restore_T = torch.empty(num_tokens, dtype=torch.long)
    offset = 0
    for group, bucket in zip(groups, buckets, strict=True):
        longest = bucket.query_SQ.shape[1]
        for row, segment in enumerate(group):
            places = torch.arange(segment.length) + offset + row * longest
            restore_T[segment.start : segment.start + segment.length] = places
        offset += bucket.query_SQ.numel()
    return Layout(
        tuple(
            Bucket(b.query_SQ.to(device), b.key_SPQ.to(device), b.mask.to(device)) for b in buckets
        ),
        restore_T.to(device),
    )


def _bucket(group: Sequence[Segment]) -> Bucket:
    longest = max(segment.length for segment in group)
    longest_prefix = max(segment.prefix_length for segment in group)
    start, length, prefix_start, prefix_length = (
        torch.tensor([getattr(segment, field) for segment in group])[:, None]
        for field in ("start", "length", "prefix_start", "prefix_length")
    )
    own = torch.arange(longest)[None]
    prefix = torch.arange(longest_prefix)[None]
    query_SQ = start + torch.minimum(own, length - 1)
    # Padding stays within the segment's own prompt: even a masked key receives 0 * NaN in backward,
    # so a diverged prompt must find no key of another one here.
    prefix_start = torch.where(prefix_length > 0, prefix_start, start)
    prefix_SP = prefix_start + torch.minimum(prefix, (prefix_length - 1).clamp(min=0))
    causal = own[:, :, None] >= own[:, None, :]  # [1, Q, Q]
    sees_prefix = (prefix < prefix_length)[:, None, :].expand(-1, longest, -1)  # [S, Q, P]
    mask = torch.cat([sees_prefix, causal.expand(len(group), -1, -1)], dim=2)[:, None]
    return Bucket(query_SQ, torch.cat([prefix_SP, query_SQ], dim=1), mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; called by transformers.

    Args:
        query: [1, A, T, D]; key and value may have fewer heads (grouped queries).
        layout: handed down through the model's keyword arguments.

    Returns:
        [1, T, A, D], and no attention weights.
    """
    query_TAD, key_TAD, value_TAD = (x[0].transpose(0, 1) for x in (query, key, value))
    outputs = []
    for bucket in layout.buckets:
        output_SAQD = scaled_dot_product_attention(
            query_TAD[bucket.query_SQ].transpose(1, 2),
            key_TAD[bucket.key_SPQ].transpose(1, 2),
            value_TAD[bucket.key_SPQ].transpose(1, 2),
            attn_mask=bucket.mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output_SAQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.restore_T][None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout says who sees whom; transformers must not build a mask of its own."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
