"""Attention over segments of a packed batch, laid side by side in buckets of similar length.

Shape letters: T tokens of a packed batch, U tokens and keys that come with the layout, S segments
of a bucket, Q longest segment, P longest prefix, K = P + Q keys, A attention heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from trainer.packing.packed_batch import Segment, changed

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
        query_SQ: where in the packed batch each query stands; padding repeats the segment's last
            token.
        padding_SQ: True where it does.
        key_SK: where each key stands, prefix first.
        query_position_SQ: positions of the queries, counted from the start of their prefix.
        key_position_SK: likewise of the keys.
        mask: True where a query may look: [S, 1, Q, K].
    """

    query_SQ: Tensor
    padding_SQ: Tensor
    key_SK: Tensor
    query_position_SQ: Tensor
    key_position_SK: Tensor
    mask: Tensor
    # Of this very object: a copy on another device makes its own, which go with it.
    _masks: dict[object, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def gain_for(self, scores: Scores, dtype: torch.dtype) -> Tensor:
        """What a score gains: as ``mask_for``, and minus infinity where a query may not look."""
        mask = self.mask_for(scores, dtype)
        if mask.dtype != torch.bool:
            return mask
        key = (scores.window, dtype)
        if key not in self._masks:
            self._masks[key] = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
        return self._masks[key]

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
                slopes_A = torch.tensor(slopes, dtype=scores.slope_dtype)
                slopes_A = slopes_A.to(mask.device, non_blocking=True)
                gain_SAK = slopes_A[:, None] * self.key_position_SK[:, None, :]
                gain_SAK = gain_SAK.to(dtype) * scores.slope_scaling
                mask = torch.where(mask, gain_SAK[:, :, None, :], -torch.inf)
            self._masks[key] = mask
        return self._masks[key]


@dataclass(frozen=True)
class Buckets:
    """All segments of a packed batch.

    Attributes:
        each: longest segments first.
        restore_T: for each token, its place among the outputs of all buckets laid end to end.
    """

    each: tuple[Bucket, ...]
    restore_T: Tensor

    def attend(
        self, query_TAD: Tensor, key_UAD: Tensor, value_UAD: Tensor, scores: Scores
    ) -> Tensor:
        """[T, A, D]; key and value may have fewer heads (grouped queries)."""
        plain = scores.softcap is None and scores.sinks_A is None
        if plain and query_TAD.is_cpu and query_TAD.shape[-1] == value_UAD.shape[-1]:
            output_TAD: Tensor = _PackedOnCpu.apply(query_TAD, key_UAD, value_UAD, self, scores)
            return output_TAD
        queries = _take(query_TAD, [bucket.query_SQ for bucket in self.each])
        at_keys = [bucket.key_SK for bucket in self.each]
        keys, values = _take(key_UAD, at_keys), _take(value_UAD, at_keys)
        outputs = [
            _bucket_attention(q, k, v, bucket, scores)
            for bucket, q, k, v in zip(self.each, queries, keys, values, strict=True)
        ]
        return self.restore(outputs)

    def restore(self, of_buckets: Sequence[Tensor]) -> Tensor:
        """From what stands at [S, A, Q, ...] of each bucket, by token, [T, A, ...]."""
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in of_buckets])[self.restore_T]


def make_buckets(segments: Sequence[Segment], device: torch.device) -> Buckets:
    """Group segments of similar length."""
    alone = [[segment] for segment in segments if not segment.candidate]
    groups = _grouped(alone, _run_length)
    groups += _grouped(_candidates(segments), lambda r: r[0].prefix_length + _run_length(r))
    buckets = tuple(_bucket(group) for group in groups)

    num_tokens = sum(segment.length for segment in segments)
    restore_T = torch.empty(num_tokens, dtype=torch.long)
    offset = 0
    for group, bucket in zip(groups, buckets, strict=True):
        longest = bucket.query_SQ.shape[1]
        for row, run in enumerate(group):
            start, length = run[0].start, _run_length(run)
            restore_T[start : start + length] = torch.arange(length) + offset + row * longest
        offset += bucket.query_SQ.numel()
    return changed(Buckets(buckets, restore_T), lambda tensor: tensor.to(device, non_blocking=True))


def _candidates(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Candidates of each row; one run of them is attended to as one, so that the keys of its
    prefixes are laid out once."""
    candidates = [segment for segment in segments if segment.candidate]
    runs = [list(run) for _, run in itertools.groupby(candidates, key=lambda s: s.prefix)]
    for run in runs:
        assert run[-1].start + run[-1].length == run[0].start + _run_length(run), "not consecutive"
    return runs


def _run_length(run: Sequence[Segment]) -> int:
    return sum(segment.length for segment in run)


def _grouped(
    runs: Sequence[list[Segment]], size: Callable[[list[Segment]], int]
) -> list[list[list[Segment]]]:
    """Runs of similar size together, the largest first."""
    groups: list[list[list[Segment]]] = []
    for run in sorted(runs, key=lambda run: (-size(run), run[0].start)):
        if groups and size(run) >= BUCKET_RATIO * size(groups[-1][0]):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _bucket(group: Sequence[Sequence[Segment]]) -> Bucket:
    """Lay out runs of segments side by side; the segments of a run do not see each other."""
    start, length, prefix_length = (
        torch.tensor(column)[:, None]
        for column in (
            [run[0].start for run in group],
            [_run_length(run) for run in group],
            [run[0].prefix_length for run in group],
        )
    )
    column = torch.arange(int(length.max()))[None]
    prefix = torch.arange(int(prefix_length.max()))[None]
    query_SQ = start + torch.minimum(column, length - 1)
    prefix_SP = _prefix_places([run[0] for run in group], prefix)
    causal = column[:, :, None] >= column[:, None, :]  # [1, Q, Q]
    own_SQ = column  # place within the segment
    if any(len(run) > 1 for run in group):
        first_SQ = _first_places(group, column)
        causal = causal & (first_SQ[:, :, None] == first_SQ[:, None, :])
        own_SQ = column - first_SQ
    sees_prefix = (prefix < prefix_length)[:, None, :].expand(-1, column.shape[1], -1)  # [S, Q, P]
    mask = torch.cat([sees_prefix, causal.expand(len(group), -1, -1)], dim=2)[:, None]
    query_position_SQ = prefix_length + own_SQ
    return Bucket(
        query_SQ,
        column >= length,
        torch.cat([prefix_SP, query_SQ], dim=1),
        query_position_SQ,
        torch.cat([prefix.expand(len(group), -1), query_position_SQ], dim=1),
        mask,
    )


def _prefix_places(segments: Sequence[Segment], prefix: Tensor) -> Tensor:
    """Where the tokens of the segments' prefixes stand, [S, P].

    Padding stays within the segment's own prompt: even a masked key receives 0 * NaN in backward,
    so a diverged prompt must find no key of another one here.
    """
    place_SP = torch.tensor([s.start for s in segments])[:, None].expand(-1, prefix.shape[1])
    for level in range(max(len(s.prefixes) for s in segments)):
        chains = [s.prefixes[level] if level < len(s.prefixes) else None for s in segments]
        start, length, behind = (
            torch.tensor(values)[:, None]
            for values in (
                [0 if one is None else one.start for one in chains],
                [0 if one is None else one.length for one in chains],
                [0 if one is None else one.prefix_length for one in chains],
            )
        )
        places = start + torch.minimum(prefix - behind, (length - 1).clamp(min=0))
        place_SP = torch.where((prefix >= behind) & (length > 0), places, place_SP)
    return place_SP


def _first_places(group: Sequence[Sequence[Segment]], column: Tensor) -> Tensor:
    """For each place of a run, where its segment begins in the run, [S, Q]."""
    firsts = []
    for run in group:
        lengths = torch.tensor([segment.length for segment in run])
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        missing = column.shape[1] - len(first)
        firsts.append(torch.cat([first, first[-1:].expand(missing)]))
    return torch.stack(firsts)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _PackedOnCpu(torch.autograd.Function):
    """Attention that saves packed queries, keys, values, outputs and sums alone.

    What a bucket adds to them, padding and a copy of the prompt for every row, is laid out again in
    backward; so the kernels of scaled-dot-product attention are called by themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_TAD: Tensor,
        key_UAD: Tensor,
        value_UAD: Tensor,
        buckets: Buckets,
        scores: Scores,
    ) -> Tensor:
        found = [
            _forward(
                _at(query_TAD, bucket.query_SQ),
                _at(key_UAD, bucket.key_SK),
                _at(value_UAD, bucket.key_SK),
                attn_mask=bucket.gain_for(scores, query_TAD.dtype),
                scale=scores.scaling,
            )
            for bucket in buckets.each
        ]
        output_TAD = buckets.restore([output_SAQD for output_SAQD, _ in found])
        sum_TA = buckets.restore([sum_SAQ for _, sum_SAQ in found])
        ctx.buckets, ctx.scores = buckets, scores
        packed = (_alone(x) for x in (query_TAD, key_UAD, value_UAD))
        ctx.save_for_backward(*packed, output_TAD, sum_TA)
        return output_TAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TAD: Tensor) -> tuple[Tensor | None, ...]:
        query_TAD, key_UAD, value_UAD, output_TAD, sum_TA = ctx.saved_tensors
        of_key_UAD, of_value_UAD = torch.zeros_like(key_UAD), torch.zeros_like(value_UAD)
        of_queries = []
        for bucket in ctx.buckets.each:
            grad_SAQD = _at(grad_TAD, bucket.query_SQ)
            # Padding repeats a token, whose gradient must count once.
            grad_SAQD = grad_SAQD.masked_fill(bucket.padding_SQ[:, None, :, None], 0)
            of_query_SAQD, *of_keys_SAKD = _backward(
                grad_SAQD,
                _at(query_TAD, bucket.query_SQ),
                _at(key_UAD, bucket.key_SK),
                _at(value_UAD, bucket.key_SK),
                _at(output_TAD, bucket.query_SQ),
                _at(sum_TA, bucket.query_SQ).contiguous(),
                0.0,
                False,
                attn_mask=bucket.gain_for(ctx.scores, query_TAD.dtype),
                scale=ctx.scores.scaling,
            )
            of_queries.append(of_query_SAQD)
            at_keys = bucket.key_SK.flatten()
            for total_UAD, of_SAKD in zip((of_key_UAD, of_value_UAD), of_keys_SAKD, strict=True):
                total_UAD.index_add_(0, at_keys, of_SAKD.transpose(1, 2).flatten(0, 1))
        return ctx.buckets.restore(of_queries), of_key_UAD, of_value_UAD, None, None


def _alone(x: Tensor) -> Tensor:
    """A tensor that keeps no larger one alive, as a third of queries, keys and values together."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()


def _at(x_TA: Tensor, place_Sn: Tensor) -> Tensor:
    """Of [T, A, ...] what stands at [S, n] places, [S, A, n, ...]."""
    return x_TA[place_Sn].transpose(1, 2)


def _take(x_TAD: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
    """What stands at [S, n] places of each bucket, [S, A, n, D]."""
    taken: Sequence[Tensor] = _Take.apply(x_TAD, *places)
    return [one.transpose(1, 2) for one in taken]


class _Take(torch.autograd.Function):
    """Rows for all buckets, whose gradients are added up in one place.

    Indexing would make a zero tensor of the whole packed batch for each bucket, and sum those.
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
        # Kernels for GPUs take groups or a mask, not both.
        if not query_SAQD.is_cpu and grouped > 1:
            key_SAKD, value_SAKD = (x.repeat_interleave(grouped, 1) for x in (key_SAKD, value_SAKD))
            grouped = 1
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
