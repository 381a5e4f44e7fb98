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
        own: segments that attend causally to themselves, in the order of their tokens.
        shared: (queries, keys): consecutive segments, and a prefix that all of them attend to.
        longest: largest number of keys of a query.
    """

    own: tuple[Segment, ...]
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

        results = [attended(segment, segment, True) for segment in self.own]
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
        everywhere = sum(segment.length for segment in self.own) == len(query_TAD)
        of_query_TAD, of_key_UAD, of_value_UAD = map(
            torch.empty_like if everywhere else torch.zeros_like, (query_TAD, key_UAD, value_UAD)
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

        for segment in self.own:
            at = slice(segment.start, segment.end)
            of_query_TAD[at], of_key_UAD[at], of_value_UAD[at] = gradients(segment, segment, True)
        for of_past_UAD in (of_key_UAD, of_value_UAD):
            of_past_UAD[len(query_TAD) :] = 0
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


def make_spans(segments: Sequence[Segment]) -> Spans | None:
    """Spans of a packed batch; None with siblings, which are too short for a call each."""
    if any(segment.sibling for segment in segments):
        return None
    shared: dict[Segment, list[Segment]] = {}  # of each prefix, the consecutive queries
    for segment in segments:
        for prefix in segment.prefixes:
            queries = shared.setdefault(prefix, [])
            start = segment.start
            if queries and queries[-1].end == start:
                start = queries.pop().start
            queries.append(Segment(start, segment.end - start))
    longest = max(segment.prefix_length + segment.length for segment in segments)
    pairs = ((q, prefix) for prefix, queries in shared.items() for q in queries)
    return Spans(tuple(segments), tuple(pairs), longest)


def learned_spans(spans: Spans, num_learned: int) -> LearnedSpans:
    """Leave out the gradients of tokens after the first ``num_learned``."""
    num_tokens = spans.own[-1].end

    def needed(queries: Segment, keys: Segment) -> bool:
        constant = num_learned <= keys.start < num_tokens  # after the tokens are learned keys
        return queries.start < num_learned or not constant

    own = tuple(segment for segment in spans.own if needed(segment, segment))
    shared = tuple(pair for pair in spans.shared if needed(*pair))
    return LearnedSpans(spans, replace(spans, own=own, shared=shared))


def _at(segment: Segment, x_TAD: Tensor) -> Tensor:
    """The tokens of a segment, as a batch of one: [1, A, n, D]."""
    return x_TAD[segment.start : segment.end].transpose(0, 1)[None]


def _join(output_QAD: Tensor, sum_QA: Tensor, other_QAD: Tensor, other_sum_QA: Tensor) -> None:
    """Add the keys of the other call to an output and its log-sum, in place."""
    share_QA = torch.sigmoid(other_sum_QA - sum_QA)  # exp(other) / (exp(sum) + exp(other))
    output_QAD.lerp_(other_QAD, share_QA[..., None].to(output_QAD.dtype))
    torch.logaddexp(sum_QA, other_sum_QA, out=sum_QA)
