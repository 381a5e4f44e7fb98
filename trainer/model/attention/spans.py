"""Attention on a CPU over spans of a packed batch: nothing is gathered, padded or masked.

A segment attends causally to itself, and all queries of consecutive segments with the same prefix
attend to that prefix in one call. The results of both are joined by the log-sums of their scores
(as blocks of keys are in FlashAttention, arXiv 2205.14135, section 3.1).

Shape letters: T tokens of a packed batch, U keys (T tokens and those of prefix tuning), Q queries
and K keys of a call, A attention heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.model.attention.bucket_layout import Scores
from trainer.model.attention.cpu_kernels import flash_backward, flash_forward
from trainer.packing.packed_batch import Segment


@dataclass(frozen=True)
class Spans:
    """Which tokens of a packed batch attend to which; ``KernelCalls`` for layers that they suit.

    Attributes:
        own: (queries, keys): segments that attend causally to themselves, in the order of their
            queries.
        shared: (queries, keys): consecutive segments, and a prefix that all of them attend to.
        longest: largest number of keys of a query.
    """

    own: tuple[tuple[Segment, Segment], ...]
    shared: tuple[tuple[Segment, Segment], ...]
    longest: int

    def suits(self, scores: Scores) -> bool:
        """Whether a layer attends to all tokens without changing the scores."""
        limits = (limit for limit in (scores.window, scores.chunk) if limit is not None)
        changed = (scores.softcap, scores.sinks_A, scores.slopes)
        return all(x is None for x in changed) and all(limit >= self.longest for limit in limits)

    def forward(
        self, query_TAD: Tensor, key_UAD: Tensor, value_UAD: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """As ``KernelCalls.forward``."""

        def attended(queries: Segment, keys: Segment, causal: bool) -> tuple[Tensor, Tensor]:
            output_1AQD, sum_1AQ = flash_forward(
                _at(queries, query_TAD),
                _at(keys, key_UAD),
                _at(keys, value_UAD),
                is_causal=causal,
                scale=scores.scaling,
            )
            return output_1AQD[0].transpose(0, 1), sum_1AQ[0].T

        results = [attended(queries, keys, True) for queries, keys in self.own]
        output_TAD, sum_TA = (torch.cat(parts) for parts in zip(*results, strict=True))
        for queries, keys in self.shared:
            at = slice(queries.start, queries.end)
            _join(output_TAD[at], sum_TA[at], *attended(queries, keys, False))
        return output_TAD, sum_TA

    def backward(
        self,
        grad_TAD: Tensor,
        query_TAD: Tensor,
        key_UAD: Tensor,
        value_UAD: Tensor,
        output_TAD: Tensor,
        sum_TA: Tensor,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``KernelCalls.backward``: the sum of the gradients of all calls."""
        of_query_TAD, of_key_UAD, of_value_UAD = map(
            torch.zeros_like, (query_TAD, key_UAD, value_UAD)
        )

        def gradients(queries: Segment, keys: Segment, causal: bool) -> list[Tensor]:
            of_each = flash_backward(
                _at(queries, grad_TAD),
                _at(queries, query_TAD),
                _at(keys, key_UAD),
                _at(keys, value_UAD),
                _at(queries, output_TAD),
                sum_TA[queries.start : queries.end].T[None].contiguous(),
                0.0,
                causal,
                scale=scores.scaling,
            )
            return [of_1AnD[0].transpose(0, 1) for of_1AnD in of_each]

        for queries, keys in self.own:
            at, keys_at = slice(queries.start, queries.end), slice(keys.start, keys.end)
            of_query_TAD[at], of_key_UAD[keys_at], of_value_UAD[keys_at] = gradients(
                queries, keys, True
            )
        for queries, keys in self.shared:
            of_query_QAD, of_key_KAD, of_value_KAD = gradients(queries, keys, False)
            of_query_TAD[queries.start : queries.end] += of_query_QAD
            of_key_UAD[keys.start : keys.end] += of_key_KAD
            of_value_UAD[keys.start : keys.end] += of_value_KAD
        return of_query_TAD, of_key_UAD, of_value_UAD


@dataclass(frozen=True)
class LearnedSpans:
    """Spans whose backward computes only gradients of keys and queries that need one.

    Attributes:
        spans: all; those of forward.
        learned: those of backward.
    """

    spans: Spans
    learned: Spans

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """As ``KernelCalls.forward``."""
        return self.spans.forward(*inputs)

    def backward(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As ``KernelCalls.backward``; zero where no gradient is needed."""
        return self.learned.backward(*inputs)


@dataclass(frozen=True)
class ReadSpans:
    """Spans of a layer of which only some outputs are read.

    Attributes:
        query_R: positions of the queries: of each segment, the first that is read and all after it.
        spans: whose queries are these.
    """

    query_R: Tensor
    spans: Spans


def make_spans(segments: Sequence[Segment]) -> Spans | None:
    """Spans of a packed batch; None with siblings, which are too short for a call each."""
    if any(segment.sibling for segment in segments):
        return None
    return _spans([(segment, segment.start, segment) for segment in segments])


def learned_spans(spans: Spans, num_learned: int) -> LearnedSpans:
    """Leave out the gradients of tokens after the first ``num_learned``."""
    num_tokens = spans.own[-1][0].end

    def needed(pair: tuple[Segment, Segment]) -> bool:
        queries, keys = pair
        constant = num_learned <= keys.start < num_tokens  # after the tokens are learned keys
        return queries.start < num_learned or not constant

    own, shared = (tuple(filter(needed, pairs)) for pairs in (spans.own, spans.shared))
    return LearnedSpans(spans, replace(spans, own=own, shared=shared))


def make_read_spans(segments: Sequence[Segment], read_U: Tensor) -> ReadSpans | None:
    """``make_spans`` of the queries at these ascending positions; None with siblings."""
    if any(segment.sibling for segment in segments):
        return None
    starts_S = torch.tensor([segment.start for segment in segments])
    index_U = torch.searchsorted(starts_S, read_U, right=True) - 1
    first = dict(zip(reversed(index_U.tolist()), reversed(read_U.tolist()), strict=True))
    computed, parts, count = [], [], 0
    for index, position in sorted(first.items()):
        segment = segments[index]
        queries = Segment(count, segment.end - position)
        computed.append((queries, position, segment))
        parts.append(torch.arange(position, segment.end))
        count += queries.length
    return ReadSpans(torch.cat(parts), _spans(computed))


def _spans(computed: Sequence[tuple[Segment, int, Segment]]) -> Spans:
    """Spans of (queries, position of the first one, their segment), in the order of queries."""
    own = []
    shared: dict[Segment, list[Segment]] = {}  # of each prefix, the consecutive queries
    for queries, position, segment in computed:
        own.append((queries, Segment(position, queries.length)))
        earlier = Segment(segment.start, position - segment.start)
        for prefix in (*segment.prefixes, *([earlier] if earlier.length else [])):
            runs = shared.setdefault(prefix, [])
            start = queries.start
            if runs and runs[-1].end == start:
                start = runs.pop().start
            runs.append(Segment(start, queries.end - start))
    longest = max(segment.prefix_length + segment.length for _, _, segment in computed)
    pairs = ((q, prefix) for prefix, runs in shared.items() for q in runs)
    return Spans(tuple(own), tuple(pairs), longest)


def _at(segment: Segment, x_TAD: Tensor) -> Tensor:
    """The tokens of a segment, as a batch of one: [1, A, n, D]."""
    return x_TAD[segment.start : segment.end].transpose(0, 1)[None]


def _join(output_QAD: Tensor, sum_QA: Tensor, other_QAD: Tensor, other_sum_QA: Tensor) -> None:
    """Add the keys of the other call to an output and its log-sum, in place."""
    share_QA = torch.sigmoid(other_sum_QA - sum_QA)  # exp(other) / (exp(sum) + exp(other))
    output_QAD.lerp_(other_QAD, share_QA[..., None].to(output_QAD.dtype))
    torch.logaddexp(sum_QA, other_sum_QA, out=sum_QA)
