"""Attention over a packed batch in one FlexAttention kernel, for GPUs.

The packed batch is neither copied into buckets nor padded: a block mask, made once per packed
batch, says which blocks of keys a block of queries sees at all, and a function says the rest within
a block (arXiv 2412.05496). Sinks are left to the buckets of ``trainer.model.attention.bucketed``.

Shape letters: T tokens of a packed batch, K keys (T and those of prefixes behind them), A attention
heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trainer.model.attention.bucketed import Scores
from trainer.packing.packed_batch import Segment, changed

#: In ``prefixes`` where there is no prefix to see.
NONE = -1


@dataclass(frozen=True)
class FlexLayout:
    """Who sees whom, per token; a segment's number is where it starts.

    Attributes:
        segment_K: the segment of each key; of queries, which come first, too.
        prefixes: [T] each: segments that each query sees the whole of, or NONE; at least one.
        position_K: counted from the start of the segment's first prefix.
    """

    segment_K: Tensor
    prefixes: tuple[Tensor, ...]
    position_K: Tensor
    _masks: dict[int | None, BlockMask] = field(default_factory=dict, init=False)
    _gains: dict[object, Tensor] = field(default_factory=dict, init=False)

    @property
    def num_queries(self) -> int:
        return len(self.prefixes[0])

    def visible(self, window: int | None) -> Callable[..., Tensor]:
        """FlexAttention's ``mask_mod``."""
        segment_K, prefixes, position_K = self.segment_K, self.prefixes, self.position_K

        def mask_mod(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (segment_K[key] == segment_K[query]) & (key <= query)
            for prefix_T in prefixes:
                seen = seen | (segment_K[key] == prefix_T[query])
            if window is not None:
                seen = seen & (position_K[query] - position_K[key] < window)
            return seen

        return mask_mod

    def block_mask(self, window: int | None) -> BlockMask:
        """Made by the first layer of a kind, used by all."""
        if window not in self._masks:
            num_queries, num_keys = self.num_queries, len(self.segment_K)
            device = self.segment_K.device
            create = _compiled(create_block_mask, device.type)
            self._masks[window] = create(
                self.visible(window), None, None, num_queries, num_keys, device
            )
        return self._masks[window]

    def score_mod(self, scores: Scores, dtype: torch.dtype) -> Callable[..., Tensor] | None:
        """What becomes of a scaled product: capped, or raised by its key's position."""
        softcap = scores.softcap
        if softcap is not None:
            return lambda score, *_: torch.tanh(score / softcap) * softcap
        if scores.slopes is None:
            return None
        key = (scores.slopes, scores.slope_dtype, scores.slope_scaling, dtype)
        if key not in self._gains:
            slopes_A = torch.tensor(scores.slopes, dtype=scores.slope_dtype)
            slopes_A = slopes_A.to(self.position_K.device, non_blocking=True)
            gain_AK = (slopes_A[:, None] * self.position_K[None]).to(dtype)
            self._gains[key] = gain_AK * scores.slope_scaling
        gain_AK = self._gains[key]
        return lambda score, _, head, __, place: score + gain_AK[head, place]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention of one layer.

        A kernel multiplies what a query does not see by zero, and zero times NaN is NaN: a prompt
        that has diverged would spread to every other in its blocks. So it works on finite numbers,
        and rows that read others get their NaN afterwards, which stops gradients there.

        Args:
            query: [1, A, T, D].
            key: [1, A, K, D], as value; both may have fewer heads (grouped queries).

        Returns:
            [1, T, A, D].
        """
        lost_T = self._lost(query, key, value)
        query, key, value = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (query, key, value))
        output_1ATD = _compiled(flex_attention, query.device.type)(
            query,
            key,
            value,
            score_mod=self.score_mod(scores, query.dtype),
            block_mask=self.block_mask(scores.window),
            scale=scores.scaling,
            enable_gqa=query.shape[1] > key.shape[1],
        )
        return torch.where(lost_T[:, None, None], torch.nan, output_1ATD.transpose(1, 2))

    def _lost(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """True where a segment, or its prefix, holds a number that is not finite: [T]."""
        num_queries = self.num_queries
        # One by one: values may have another head size than keys.
        bad_T, bad_key_K, bad_value_K = (
            ~x.isfinite().all(3).all(1)[0] for x in (query, key, value)
        )
        bad_K = bad_key_K | bad_value_K
        bad_K = torch.cat([bad_K[:num_queries] | bad_T, bad_K[num_queries:]])
        segment_is_bad = bad_K.new_zeros(len(bad_K) + 1, dtype=torch.int32)  # the last: NONE
        segment_is_bad.index_add_(0, self.segment_K, bad_K.int())
        found_T = segment_is_bad[self.segment_K[:num_queries]]
        for prefix_T in self.prefixes:
            found_T = found_T + segment_is_bad[prefix_T]
        return found_T > 0


def make_flex_layout(segments: Sequence[Segment], device: torch.device) -> FlexLayout:
    """Per-token form of segments."""
    num_tokens = sum(segment.length for segment in segments)
    prefixes = {(prefix.start, prefix.length) for s in segments for prefix in s.prefixes}
    past = [(start, length) for start, length in prefixes if start >= num_tokens]
    num_keys = num_tokens + sum(length for _, length in past)
    segment_K = torch.empty(num_keys, dtype=torch.long)
    position_K = torch.empty(num_keys, dtype=torch.long)
    depth = max(1, *(len(segment.prefixes) for segment in segments))
    prefix_CT = torch.full((depth, num_tokens), NONE)
    for segment in segments:
        place = slice(segment.start, segment.start + segment.length)
        segment_K[place] = segment.start
        position_K[place] = segment.prefix_length + torch.arange(segment.length)
        for level, prefix in enumerate(segment.prefixes):
            if prefix.length:
                prefix_CT[level, place] = prefix.start
    for start, length in past:
        segment_K[start : start + length] = start
        position_K[start : start + length] = torch.arange(length)
    layout = FlexLayout(segment_K, prefix_CT.unbind(), position_K)
    return changed(layout, lambda tensor: tensor.to(device, non_blocking=True))


@functools.cache
def _compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Compiled for GPUs, where it is a kernel; elsewhere as it is, for tests of the numbers."""
    return torch.compile(function) if device_type == "cuda" else function
