"""Attention over a packed stream, plugged into transformers by name.

Each segment of the stream attends causally to itself and to the whole of its prefix segment, within
the layer's window if it has one. The tokens stay packed in every linear layer; only here, segments
are laid side by side in a few buckets of similar length and handed to scaled-dot-product attention.

A prefix may also be keys and values that come with the layout instead of from tokens (prefix
tuning, arXiv 2101.00190). They are used as they are, behind any rotation, as those in a cache are;
here they stand behind the stream's own.

Shape letters: T tokens of a stream, S segments of a bucket, Q longest segment, P longest prefix,
K = P + Q keys, A attention heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from trainer.base.flex import FlexLayout, make_flex_layout
from trainer.errors import BadInput
from trainer.tasks.streams import Segment, changed

PACKED = "promptshard_packed"
# A bucket takes segments down to this share of its longest: less padding against fewer calls.
BUCKET_RATIO = 0.7


@dataclass(frozen=True)
class Scores:
    """How a layer turns queries and keys into scores.

    Attributes:
        scaling: of the products.
        window: positions a token sees, its own included; None for all.
        softcap: scores pass through ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks_A: a score of nothing, one per head, that takes its share of the softmax (gpt-oss).
        slopes: what each head's score gains per position of the key (ALiBi, arXiv 2108.12409).
        slope_dtype: the gain is rounded to it,
        slope_scaling: and then multiplied by this.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks_A: Tensor | None = None
    slopes: tuple[float, ...] | None = None
    slope_dtype: torch.dtype = torch.float32
    slope_scaling: float = 1.0


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, side by side.

    Attributes:
        query_SQ: where in the stream each query stands; padding repeats the segment's last token.
        key_SK: where each key stands, prefix first.
        query_position_SQ: positions of the queries, counted from the start of their prefix.
        key_position_SK: likewise of the keys.
        mask: True where a query may look: [S, 1, Q, K].
    """

    query_SQ: Tensor
    key_SK: Tensor
    query_position_SQ: Tensor
    key_position_SK: Tensor
    mask: Tensor
    _masks: dict[object, Tensor] = field(default_factory=dict)

    def mask_for(self, scores: Scores, dtype: torch.dtype) -> Tensor:
        """True where a query may look, or what its score gains there; one for all layers alike.

        Returns:
            bool [S, 1, Q, K], or with slopes ``dtype`` [S, A, Q, K].
        """
        window, slopes = scores.window, scores.slopes
        if window is not None and window >= self.key_position_SK.shape[1]:
            window = None
        if window is None and slopes is None:
            return self.mask
        key = (window, slopes, scores.slope_dtype, scores.slope_scaling, dtype)
        if key not in self._masks:
            mask = self.mask
            if window is not None:
                distance_SQK = self.query_position_SQ[:, :, None] - self.key_position_SK[:, None]
                mask = mask & (distance_SQK < window)[:, None]
            if slopes is not None:
                slopes_A = torch.tensor(slopes, device=mask.device, dtype=scores.slope_dtype)
                gain_SAK = slopes_A[:, None] * self.key_position_SK[:, None, :]
                gain_SAK = gain_SAK.to(dtype) * scores.slope_scaling
                mask = torch.where(mask, gain_SAK[:, :, None, :], -torch.inf)
            self._masks[key] = mask
        return self._masks[key]


@dataclass(frozen=True)
class Layout:
    """How the segments of one stream attend; made once, used by every layer.

    Attributes:
        restore_T: for each token, its place among the outputs of all buckets laid end to end.
        past: per layer, keys and values [P, 2, A, D] that stand behind those of the tokens; empty
            if there are none.
        flex: the same for one kernel instead of buckets; None where these are wanted.
    """

    buckets: tuple[Bucket, ...]
    restore_T: Tensor
    past: tuple[Tensor, ...] = ()
    flex: FlexLayout | None = None


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
    return changed(Layout(buckets, restore_T), lambda tensor: tensor.to(device))


def with_past(layout: Layout, past: Sequence[Tensor]) -> Layout:
    """The layout with keys and values behind those of the tokens.

    Args:
        past: [P, L, 2, A, D] of prompts, in the order of their segments.
    """
    # One slice per layer, made here once: a slice taken in every layer would send back a gradient
    # of the whole from each of them.
    return replace(layout, past=torch.cat(list(past)).unbind(1)) if past else layout


def with_flex(layout: Layout, segments: Sequence[Segment]) -> Layout:
    """The layout for one kernel, except where a layer has sinks."""
    return replace(layout, flex=make_flex_layout(segments, layout.restore_T.device))


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
    query_position_SQ = prefix_length + own
    return Bucket(
        query_SQ,
        torch.cat([prefix_SP, query_SQ], dim=1),
        query_position_SQ,
        torch.cat([prefix.expand(len(group), -1), query_position_SQ], dim=1),
        mask,
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores, layer: int
) -> Tensor:
    """Attention of one layer over a packed stream.

    Args:
        query: [1, A, T, D]; key and value may have fewer heads (grouped queries).
        layer: its number, from 0.

    Returns:
        [1, T, A, D].
    """
    if layout.past:
        past_2APD = layout.past[layer].to(key.dtype).permute(1, 2, 0, 3)
        key = torch.cat([key, past_2APD[None, 0]], dim=2)
        value = torch.cat([value, past_2APD[None, 1]], dim=2)
    if layout.flex is not None and scores.sinks_A is None:
        return layout.flex.attend(query, key, value, scores)
    queries = _take(query, [bucket.query_SQ for bucket in layout.buckets])
    at_keys = [bucket.key_SK for bucket in layout.buckets]
    keys, values = _take(key, at_keys), _take(value, at_keys)
    outputs = []
    for bucket, q, k, v in zip(layout.buckets, queries, keys, values, strict=True):
        output_SAQD = _bucket_attention(q, k, v, bucket, scores)
        outputs.append(output_SAQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.restore_T][None]


def _take(x: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
    """Of [1, A, T, D] what stands at [S, n] places of each bucket, [S, A, n, D]."""
    taken: Sequence[Tensor] = _Take.apply(x[0].transpose(0, 1), *places)
    return [one.transpose(1, 2) for one in taken]


class _Take(torch.autograd.Function):
    """Rows for all buckets, whose gradients are added up in one place.

    Indexing would make a zero tensor of the whole stream for each bucket, and sum those.
    """

    @staticmethod
    def forward(ctx: Any, x_TAD: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
        ctx.like, ctx.places = (x_TAD.shape, x_TAD.dtype, x_TAD.device), places
        ctx.set_materialize_grads(False)
        return tuple(x_TAD[place] for place in places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.like
        grad_TAD = torch.zeros(shape, dtype=dtype, device=device)
        for place, grad in zip(ctx.places, grads, strict=True):
            if grad is not None:
                grad_TAD.index_put_((place,), grad, accumulate=True)
        return grad_TAD, *(None for _ in ctx.places)


def _bucket_attention(
    query_SAQD: Tensor, key_SAKD: Tensor, value_SAKD: Tensor, bucket: Bucket, scores: Scores
) -> Tensor:
    mask = bucket.mask_for(scores, query_SAQD.dtype)
    grouped = query_SAQD.shape[1] // key_SAKD.shape[1]
    if scores.softcap is None and scores.sinks_A is None:
        return scaled_dot_product_attention(
            query_SAQD,
            key_SAKD,
            value_SAKD,
            attn_mask=mask,
            scale=scores.scaling,
            enable_gqa=grouped > 1,
        )
    key_SAKD, value_SAKD = (x.repeat_interleave(grouped, dim=1) for x in (key_SAKD, value_SAKD))
    score = query_SAQD @ key_SAKD.mT * scores.scaling
    if scores.softcap is not None:
        score = torch.tanh(score / scores.softcap) * scores.softcap
    score = score.masked_fill(~mask, -torch.inf)
    if scores.sinks_A is not None:
        sinks = scores.sinks_A.to(score.dtype)[:, None, None].expand(*score.shape[:3], 1)
        score = torch.cat([score, sinks], dim=-1)
    share = score.softmax(dim=-1, dtype=torch.float32).to(value_SAKD.dtype)
    return share[..., : key_SAKD.shape[2]] @ value_SAKD


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Layout | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; called by transformers.

    Args:
        query: [1, A, T, D]; key and value may have fewer heads (grouped queries).
        layout: handed down through the model's keyword arguments, or in place of the mask.

    Returns:
        [1, T, A, D], and no attention weights.
    """
    layout = layout or attention_mask  # type: ignore[assignment]
    assert isinstance(layout, Layout)
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    layer: Any = module.layer_idx
    return attend(query, key, value, layout, scores, layer), None


def resolve_attention(setting: str, device: torch.device, packed: bool) -> bool:
    """Whether ``engine.attention`` asks for FlexAttention.

    Raises:
        BadInput: where it cannot run backward, or no rows are packed.
    """
    if setting == "flex" and not packed:
        raise BadInput(
            "engine.attention: flex is for packed rows, but those of this base are padded; use auto"
        )
    if setting == "flex" and device.type != "cuda":
        raise BadInput(
            f"engine.attention: flex, but this machine computes on {device.type}, where "
            "FlexAttention has no backward; use sdpa or auto"
        )
    return setting == "flex"


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout says who sees whom; transformers must not build a mask of its own."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
