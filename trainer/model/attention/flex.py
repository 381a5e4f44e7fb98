"""Attention over a packed batch in one FlexAttention kernel, for GPUs.

The packed batch is neither copied into buckets nor padded. A block mask, computed once per packed
batch, lists the blocks of keys that each block of queries attends to, and a function masks single
keys within a block (arXiv 2412.05496). Layers with sinks use ``trainer.model.attention.bucketed``.

Shape letters: T tokens of a packed batch, K keys (T tokens, then those of prefix tuning), A
attention heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trainer.model.attention.bucket_layout import Scores
from trainer.packing.packed_batch import Segment, map_tensors

#: In ``prefixes``: no prefix.
NONE = -1
#: Compiled forms of one function. torch's own limit of 8 is too low: layers with and without a
#: window, training and validation, rows and their candidates, and batches of one block each have
#: their own. Beyond the limit, torch keeps the scores of all pairs of tokens in memory.
MAX_FORMS = 64


@dataclass(frozen=True)
class FlexLayout:
    """Which keys each token attends to; a segment is identified by the index of its first token.

    Attributes:
        segment_K: segment of each key; the first T are also those of the queries.
        prefixes: at least one tensor [T]: a segment that each query attends to in full, or NONE.
        position_K: positions, counted from the start of the segment's first prefix.
    """

    segment_K: Tensor
    prefixes: tuple[Tensor, ...]
    position_K: Tensor
    _masks: dict[object, BlockMask] = field(default_factory=dict, init=False)
    _gains: dict[object, Tensor] = field(default_factory=dict, init=False)

    @property
    def num_queries(self) -> int:
        return len(self.prefixes[0])

    def visible(self, window: int | None, chunk: int | None = None) -> Callable[..., Tensor]:
        """FlexAttention's ``mask_mod``."""
        segment_K, prefixes, position_K = self.segment_K, self.prefixes, self.position_K

        def mask_mod(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            attends = (segment_K[key] == segment_K[query]) & (key <= query)
            for prefix_T in prefixes:
                attends = attends | (segment_K[key] == prefix_T[query])
            if window is not None:
                attends = attends & (position_K[query] - position_K[key] < window)
            if chunk is not None:
                attends = attends & (position_K[query] // chunk == position_K[key] // chunk)
            return attends

        return mask_mod

    def block_mask(self, window: int | None, chunk: int | None = None) -> BlockMask:
        """Block mask of all layers with this window and chunk, computed on first use."""
        if (window, chunk) not in self._masks:
            num_queries, num_keys = self.num_queries, len(self.segment_K)
            device = self.segment_K.device
            create = _compiled(create_block_mask, device.type)
            self._masks[window, chunk] = create(
                self.visible(window, chunk), None, None, num_queries, num_keys, device
            )
        return self._masks[window, chunk]

    def score_mod(self, scores: Scores, dtype: torch.dtype) -> Callable[..., Tensor] | None:
        """FlexAttention's ``score_mod``: softcap, or the gain of ALiBi by position of the key."""
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
        """Attention of one layer, with the shapes of ``interface.attend``.

        The kernel multiplies masked values by zero, and zero times NaN is NaN: a diverged prompt
        would spread to others in its blocks. Therefore the kernel gets finite numbers only. Tokens
        that attend to non-finite numbers are set to NaN afterwards, which also stops gradients.
        """
        is_bad_T = self._attends_to_non_finite(query, key, value)
        query, key, value = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (query, key, value))
        output_1ATD = _compiled(flex_attention, query.device.type)(
            query,
            key,
            value,
            score_mod=self.score_mod(scores, query.dtype),
            block_mask=self.block_mask(scores.window, scores.chunk),
            scale=scores.scaling,
            enable_gqa=query.shape[1] > key.shape[1],
        )
        return torch.where(is_bad_T[:, None, None], torch.nan, output_1ATD.transpose(1, 2))

    def _attends_to_non_finite(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """True if the token's segment or its prefix contains a non-finite number: [T]."""
        num_queries = self.num_queries
        # Not stacked: the head size of values may differ from that of keys.
        bad_T, bad_key_K, bad_value_K = (
            ~x.isfinite().all(3).all(1)[0] for x in (query, key, value)
        )
        bad_K = bad_key_K | bad_value_K
        bad_K = torch.cat([bad_K[:num_queries] | bad_T, bad_K[num_queries:]])
        segment_is_bad = bad_K.new_zeros(len(bad_K) + 1, dtype=torch.int32)  # NONE reads the last
        segment_is_bad.index_add_(0, self.segment_K, bad_K.int())
        num_bad_T = segment_is_bad[self.segment_K[:num_queries]]
        for prefix_T in self.prefixes:
            num_bad_T = num_bad_T + segment_is_bad[prefix_T]
        return num_bad_T > 0


def make_flex_layout(segments: Sequence[Segment], device: torch.device) -> FlexLayout:
    """Compute the segment, prefixes and position of every token."""
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
    return map_tensors(layout, lambda tensor: tensor.to(device, non_blocking=True))


@functools.cache
def _compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The function, compiled to a kernel on CUDA; uncompiled elsewhere, for tests."""
    return compile_forms(function) if device_type == "cuda" else function


def compile_forms(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` with up to ``MAX_FORMS`` forms of the function."""
    compiled = torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_FORMS):
            return compiled(*args, **kwargs)

    return call
