"""Elements of a packed batch at places that repeat, with gradients summed in fp32.

Shape letters: T tokens of a packed batch, S segments, n places of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def take(x_T: Tensor, indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Elements of [T, ...] at each of the indices [S, n]: [S, n, ...]."""
    elements: tuple[Tensor, ...] = _Take.apply(x_T, *indices)
    return elements


class _Take(torch.autograd.Function):
    """Indexing by several tensors, with gradients accumulated in one tensor.

    Plain indexing would allocate a zero gradient of the packed batch for each index and sum them.
    Also, it would round after every addition: in bfloat16, 1,000 ones would add up to 256. A
    prompt's tokens get a gradient from every row.
    """

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.like, ctx.indices = (x_T.shape, x_T.dtype, x_T.device), indices
        ctx.set_materialize_grads(False)
        return tuple(x_T[index] for index in indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.like
        sum_type = torch.promote_types(dtype, torch.float32)
        sum_T = torch.zeros(shape, dtype=sum_type, device=device)
        for index, grad in zip(ctx.indices, grads, strict=True):
            if grad is not None:
                sum_T.index_put_((index,), grad.to(sum_type), accumulate=True)
        return sum_T.to(dtype), *(None for _ in ctx.indices)
