"""Layout of the segments of a packed batch in buckets of similar length.

Shape letters: T tokens of a packed batch, S segments of a bucket, Q longest segment, P longest
prefix, K = P + Q keys, A attention heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.packing.length_groups import group_by_length
from trainer.packing.packed_batch import Segment

#: Kernels of GPUs require rows of a bias to start at multiples of this many elements.
BIAS_ALIGNMENT = 8


@dataclass(frozen=True)
class Scores:
    """Parameters of a layer's attention scores.

    Attributes:
        scaling: factor of the products.
        window: number of positions a token attends to, including its own; None: all.
        chunk: a token attends only to those of its chunk of this many positions; None: to all.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); None: uncapped.
        sinks_A: an extra score per head in the softmax, without a key (gpt-oss).
        slopes: per head, gain of the score per position of the key (ALiBi, arXiv 2108.12409).
        slope_dtype: type of the slopes and of their products with positions.
        slope_scaling: factor of the gain, applied after rounding.
    """

    scaling: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks_A: Tensor | None = None
    slopes: tuple[float, ...] | None = None
    slope_dtype: torch.dtype = torch.float32
    slope_scaling: float = 1.0


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, side by side; padding repeats the last element of each.

    Attributes:
        query_SQ: index of each query in the packed batch.
        padding_SQ: True for padding.
        key_SK: index of each key, prefixes first.
        query_position_SQ: positions of the queries, counted from the start of their prefix.
        key_position_SK: positions of the keys.
        mask: True where a query attends to a key, ignoring the window: [S, 1, Q, K].
    """

    query_SQ: Tensor
    padding_SQ: Tensor
    key_SK: Tensor
    query_position_SQ: Tensor
    key_position_SK: Tensor
    mask: Tensor
    # Not copied with the bucket: a copy on another device computes its own.
    _masks: dict[object, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def mask_for(self, scores: Scores, dtype: torch.dtype) -> Tensor:
        """Mask or bias of the scores, computed once for all layers that share it.

        Returns:
            bool [S, 1, Q, K], True where a query attends; with slopes ``dtype`` [S, A, Q, K], the
            gain of each score and minus infinity where a query does not attend.
        """
        slopes, longest = scores.slopes, self.key_position_SK.shape[1]
        window = None if scores.window is None or scores.window >= longest else scores.window
        chunk = None if scores.chunk is None or scores.chunk >= longest else scores.chunk
        if window is None and chunk is None and slopes is None:
            return self.mask

        def make() -> Tensor:
            mask = self.mask
            if window is not None:
                distance_SQK = self.query_position_SQ[:, :, None] - self.key_position_SK[:, None]
                mask = mask & (distance_SQK < window)[:, None]
            if chunk is not None:
                query_SQ, key_SK = self.query_position_SQ // chunk, self.key_position_SK // chunk
                mask = mask & (query_SQ[:, :, None] == key_SK[:, None])[:, None]
            if slopes is None:
                return mask
            slopes_A = torch.tensor(slopes, dtype=scores.slope_dtype)
            slopes_A = slopes_A.to(mask.device, non_blocking=True)
            gain_SAK = slopes_A[:, None] * self.key_position_SK[:, None, :]
            gain_SAK = gain_SAK.to(dtype) * scores.slope_scaling
            shape = (*gain_SAK.shape[:2], *mask.shape[2:])
            bias = _zero_bias(shape, dtype, mask.device).copy_(gain_SAK[:, :, None, :])
            return bias.masked_fill_(~mask, -torch.inf)

        key = (window, chunk, slopes, scores.slope_dtype, scores.slope_scaling, dtype)
        return self._cached(key, make)

    def bias_for(self, scores: Scores, dtype: torch.dtype) -> Tensor:
        """``mask_for`` as a bias of type ``dtype``: 0 or minus infinity in place of a bool.

        Kernels of GPUs take no bool. torch would make the bias again in every layer, and keep each
        of them for backward.
        """
        mask = self.mask_for(scores, dtype)
        if mask.dtype != torch.bool:
            return mask

        def make() -> Tensor:
            bias = _zero_bias(mask.shape, dtype, mask.device)
            return bias.masked_fill_(~mask, -torch.inf)

        return self._cached((scores.window, scores.chunk, dtype), make)

    def _cached(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]


@dataclass(frozen=True)
class Buckets:
    """All segments of a packed batch, or those with queries that are read.

    Attributes:
        each: longest segments first.
        restore_T: index of each token, or each query, in the concatenated outputs of all buckets.
    """

    each: tuple[Bucket, ...]
    restore_T: Tensor

    def restore(self, of_buckets: Sequence[Tensor]) -> Tensor:
        """Reorder values [S, A, Q, ...] of every bucket by token: [T, A, ...]."""
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in of_buckets])[self.restore_T]


def make_buckets(segments: Sequence[Segment]) -> Buckets:
    """Group segments of similar length, on the CPU."""
    alone = [[segment] for segment in segments if not segment.sibling]
    groups = group_by_length(alone, _run_length)
    groups += group_by_length(
        _sibling_runs(segments), lambda r: r[0].prefix_length + _run_length(r)
    )
    return _with_order([_bucket(group) for group in groups], sum(s.length for s in segments))


def limit_queries(buckets: Buckets, read_U: Tensor) -> Buckets:
    """Keep the queries of these ascending positions, which are numbered in this order."""
    number_T = torch.full((len(buckets.restore_T),), -1)
    number_T[read_U] = torch.arange(len(read_U))
    limited = [_limited(bucket, number_T) for bucket in buckets.each]
    return _with_order([bucket for bucket in limited if len(bucket.query_SQ)], len(read_U))


def _limited(bucket: Bucket, number_T: Tensor) -> Bucket:
    """Keep the queries with a number of 0 or more, and the segments that have some."""
    number_SQ = number_T[bucket.query_SQ].masked_fill(bucket.padding_SQ, -1)
    count_S = (number_SQ >= 0).sum(1)
    column_SQ = (number_SQ < 0).to(torch.uint8).sort(dim=1, stable=True).indices
    column_SQ = column_SQ[:, : int(count_S.max())]
    padding_SQ = torch.arange(column_SQ.shape[1]) >= count_S[:, None]
    column_SQ = torch.where(padding_SQ, column_SQ[:, :1], column_SQ)
    kept = count_S > 0
    at = column_SQ[:, None, :, None].expand(-1, 1, -1, bucket.mask.shape[-1])
    return Bucket(
        query_SQ=number_SQ.gather(1, column_SQ)[kept],
        padding_SQ=padding_SQ[kept],
        key_SK=bucket.key_SK[kept],
        query_position_SQ=bucket.query_position_SQ.gather(1, column_SQ)[kept],
        key_position_SK=bucket.key_position_SK[kept],
        mask=bucket.mask.gather(2, at)[kept],
    )


def _with_order(buckets: Sequence[Bucket], num_queries: int) -> Buckets:
    restore_T = torch.empty(num_queries, dtype=torch.long)
    offset = 0
    for bucket in buckets:
        places = torch.arange(bucket.query_SQ.numel()).view_as(bucket.query_SQ) + offset
        restore_T[bucket.query_SQ[~bucket.padding_SQ]] = places[~bucket.padding_SQ]
        offset += bucket.query_SQ.numel()
    return Buckets(tuple(buckets), restore_T)


def _sibling_runs(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Runs of siblings, so that their common prefix is laid out once."""
    siblings = [segment for segment in segments if segment.sibling]
    runs = [list(run) for _, run in itertools.groupby(siblings, key=lambda s: s.prefix)]
    for run in runs:
        assert run[-1].start + run[-1].length == run[0].start + _run_length(run), "not consecutive"
    return runs


def _run_length(run: Sequence[Segment]) -> int:
    return sum(segment.length for segment in run)


def _bucket(group: Sequence[Sequence[Segment]]) -> Bucket:
    """Lay out runs of segments side by side; the segments of a run do not attend to each other."""
    length = torch.tensor([_run_length(run) for run in group])[:, None]
    prefix_length = torch.tensor([run[0].prefix_length for run in group])[:, None]
    column = torch.arange(int(length.max()))[None]
    prefix = torch.arange(int(prefix_length.max()))[None]
    query_SQ = torch.tensor([run[0].start for run in group])[:, None]
    query_SQ = query_SQ + torch.minimum(column, length - 1)
    # Padding repeats keys of the segment's own prompt: even masked keys receive 0 * NaN in
    # backward, so a prompt that diverged would spread to any other prompt used here.
    prefix_SP = stack_padded([prefix_indices(run[0]) for run in group])[:, : prefix.shape[1]]
    causal = column[:, :, None] >= column[:, None, :]  # [1, Q, Q]
    own_SQ = column  # index within the segment
    if any(len(run) > 1 for run in group):
        first_SQ = stack_padded([_segment_starts(run) for run in group])
        causal = causal & (first_SQ[:, :, None] == first_SQ[:, None, :])
        own_SQ = column - first_SQ
    sees_prefix = (prefix < prefix_length)[:, None, :].expand(-1, column.shape[1], -1)  # [S, Q, P]
    query_position_SQ = prefix_length + own_SQ
    return Bucket(
        query_SQ=query_SQ,
        padding_SQ=column >= length,
        key_SK=torch.cat([prefix_SP, query_SQ], dim=1),
        query_position_SQ=query_position_SQ,
        key_position_SK=torch.cat([prefix.expand(len(group), -1), query_position_SQ], dim=1),
        mask=torch.cat([sees_prefix, causal.expand(len(group), -1, -1)], dim=2)[:, None],
    )


def stack_padded(rows: Sequence[Tensor]) -> Tensor:
    """Stack vectors of different lengths; each is padded with its last element."""
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])


def prefix_indices(segment: Segment) -> Tensor:
    """Indices of the tokens of a segment's prefixes; without prefixes, of its first token."""
    if not segment.prefix_length:
        return torch.tensor([segment.start])
    return torch.cat([torch.arange(p.start, p.start + p.length) for p in segment.prefixes])


def _zero_bias(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a bias of zeros, whose rows are aligned on a GPU (``BIAS_ALIGNMENT``)."""
    unused = 0 if device.type == "cpu" else -shape[-1] % BIAS_ALIGNMENT
    rows = torch.zeros(*shape[:-1], shape[-1] + unused, dtype=dtype, device=device)
    return rows[..., : shape[-1]]


def _segment_starts(run: Sequence[Segment]) -> Tensor:
    """For each token of a run, the offset in the run at which its segment starts."""
    lengths = torch.tensor([segment.length for segment in run])
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
