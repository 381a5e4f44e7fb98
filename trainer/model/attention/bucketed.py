"""Attention over buckets of segments, with torch's kernels or, for softcap and sinks, without.

Shape letters: T tokens of a packed batch, U keys (T tokens and those of prefix tuning), S segments
of a bucket, Q longest segment, P longest prefix, K = P + Q keys, A attention heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trainer.model.attention.bucket_layout import Bucket, Buckets, Scores
from trainer.model.attention.cpu_kernels import attend_on_cpu, flash_backward, flash_forward
from trainer.model.attention.indexing import take


def attend_in_buckets(
    query_TAD: Tensor, key_UAD: Tensor, value_UAD: Tensor, buckets: Buckets, scores: Scores
) -> Tensor:
    """Attention of one layer, [T, A, D]; key and value may have fewer heads (grouped queries)."""
    plain = scores.softcap is None and scores.sinks_A is None
    if plain and query_TAD.is_cpu and query_TAD.shape[-1] == value_UAD.shape[-1]:
        return attend_on_cpu(query_TAD, key_UAD, value_UAD, PaddedCalls(buckets), scores)
    queries = _gather(query_TAD, [bucket.query_SQ for bucket in buckets.each])
    key_indices = [bucket.key_SK for bucket in buckets.each]
    keys, values = _gather(key_UAD, key_indices), _gather(value_UAD, key_indices)
    outputs = [
        _bucket_attention(q, k, v, bucket, scores)
        for bucket, q, k, v in zip(buckets.each, queries, keys, values, strict=True)
    ]
    return buckets.restore(outputs)


@dataclass(frozen=True)
class PaddedCalls:
    """One call of the CPU kernels per bucket.

    Backward gathers the padded buckets again, in which every row repeats its prompt.
    """

    buckets: Buckets

    def forward(
        self, query_TAD: Tensor, key_UAD: Tensor, value_UAD: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """As ``KernelCalls.forward``."""
        results = [
            flash_forward(
                _at(query_TAD, bucket.query_SQ),
                _at(key_UAD, bucket.key_SK),
                _at(value_UAD, bucket.key_SK),
                attn_mask=bucket.bias_for(scores, query_TAD.dtype),
                scale=scores.scaling,
            )
            for bucket in self.buckets.each
        ]
        outputs, sums = zip(*results, strict=True)
        return self.buckets.restore(outputs), self.buckets.restore(sums)

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
        """As ``KernelCalls.backward``."""
        of_key_UAD, of_value_UAD = torch.zeros_like(key_UAD), torch.zeros_like(value_UAD)
        of_queries = []
        for bucket in self.buckets.each:
            grad_SAQD = _at(grad_TAD, bucket.query_SQ)
            # Padding repeats a token, whose gradient must count once.
            grad_SAQD = grad_SAQD.masked_fill(bucket.padding_SQ[:, None, :, None], 0)
            of_query_SAQD, *of_keys_SAKD = flash_backward(
                grad_SAQD,
                _at(query_TAD, bucket.query_SQ),
                _at(key_UAD, bucket.key_SK),
                _at(value_UAD, bucket.key_SK),
                _at(output_TAD, bucket.query_SQ),
                _at(sum_TA, bucket.query_SQ).contiguous(),
                0.0,
                False,
                attn_mask=bucket.bias_for(scores, query_TAD.dtype),
                scale=scores.scaling,
            )
            of_queries.append(of_query_SAQD)
            at_keys = bucket.key_SK.flatten()
            for total_UAD, of_SAKD in zip((of_key_UAD, of_value_UAD), of_keys_SAKD, strict=True):
                total_UAD.index_add_(0, at_keys, of_SAKD.transpose(1, 2).flatten(0, 1))
        return self.buckets.restore(of_queries), of_key_UAD, of_value_UAD


def _at(x_TA: Tensor, index_Sn: Tensor) -> Tensor:
    """Elements of [T, A, ...] at the indices, [S, A, n, ...]."""
    # Twice as fast on a CPU as indexing with a matrix.
    return x_TA.index_select(0, index_Sn.flatten()).unflatten(0, index_Sn.shape).transpose(1, 2)


def _gather(x_TAD: Tensor, indices: Sequence[Tensor]) -> list[Tensor]:
    """Elements at the indices [S, n] of each bucket, [S, A, n, D]."""
    return [x_SnAD.transpose(1, 2) for x_SnAD in take(x_TAD, indices)]


def _bucket_attention(
    query_SAQD: Tensor, key_SAKD: Tensor, value_SAKD: Tensor, bucket: Bucket, scores: Scores
) -> Tensor:
    grouped = query_SAQD.shape[1] // key_SAKD.shape[1]
    if scores.softcap is None and scores.sinks_A is None:
        # GPU kernels support grouped queries or a mask, not both.
        if not query_SAQD.is_cpu and grouped > 1:
            key_SAKD, value_SAKD = (x.repeat_interleave(grouped, 1) for x in (key_SAKD, value_SAKD))
            grouped = 1
        return scaled_dot_product_attention(
            query_SAQD,
            key_SAKD,
            value_SAKD,
            attn_mask=bucket.bias_for(scores, query_SAQD.dtype),
            scale=scores.scaling,
            enable_gqa=grouped > 1,
        )
    key_SAKD, value_SAKD = (x.repeat_interleave(grouped, dim=1) for x in (key_SAKD, value_SAKD))
    score = query_SAQD @ key_SAKD.mT * scores.scaling
    if scores.softcap is not None:
        score = torch.tanh(score / scores.softcap) * scores.softcap
    mask = bucket.mask_for(scores, query_SAQD.dtype)
    score = score.masked_fill(~mask, -torch.inf)
    if scores.sinks_A is not None:
        sinks = scores.sinks_A.to(score.dtype)[:, None, None].expand(*score.shape[:3], 1)
        score = torch.cat([score, sinks], dim=-1)
    share = score.softmax(dim=-1, dtype=torch.float32).to(value_SAKD.dtype)
    return share[..., : key_SAKD.shape[2]] @ value_SAKD
