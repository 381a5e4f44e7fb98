"""Attention of a packed batch with the CPU kernels of scaled-dot-product attention.

Shape letters: T tokens of a packed batch, U keys (T tokens and those of prefix tuning), A attention
heads, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.model.attention.bucket_layout import Scores

#: Both also take key and value with fewer heads. Backward needs the output and the log-sum of all
#: keys of a query, also if a call has only some of them.
flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class KernelCalls(Protocol):
    """How a packed batch is divided into calls of the kernels."""

    def forward(
        self, query_TAD: Tensor, key_UAD: Tensor, value_UAD: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """Output [T, A, D], and log-sums of scores [T, A]."""
        ...

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
        """Gradients of query, key and value."""
        ...


def attend_on_cpu(
    query_TAD: Tensor, key_UAD: Tensor, value_UAD: Tensor, calls: KernelCalls, scores: Scores
) -> Tensor:
    """Attention of one layer, [T, A, D]; key and value may have fewer heads (grouped queries)."""
    output_TAD: Tensor = _PackedOnCpu.apply(query_TAD, key_UAD, value_UAD, calls, scores)
    return output_TAD


class _PackedOnCpu(torch.autograd.Function):
    """Saves only packed queries, keys, values, outputs and log-sums."""

    @staticmethod
    def forward(
        ctx: Any,
        query_TAD: Tensor,
        key_UAD: Tensor,
        value_UAD: Tensor,
        calls: KernelCalls,
        scores: Scores,
    ) -> Tensor:
        output_TAD, sum_TA = calls.forward(query_TAD, key_UAD, value_UAD, scores)
        ctx.calls, ctx.scores = calls, scores
        packed = (_own_storage(x) for x in (query_TAD, key_UAD, value_UAD))
        ctx.save_for_backward(*packed, output_TAD, sum_TA)
        return output_TAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TAD: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.calls.backward(grad_TAD, *ctx.saved_tensors, ctx.scores), None, None


def _own_storage(x: Tensor) -> Tensor:
    """The tensor, cloned if it is a view that keeps a larger one alive (a fused QKV product)."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()
