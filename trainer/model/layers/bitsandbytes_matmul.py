"""LLM.int8() with the kernels of bitsandbytes (arXiv 2208.07339).

The kernels read the stored weights directly. The library's module ``Linear8bitLt`` is not used:
under ZeRO-3 it keeps a full copy of the weight on every rank.

Shape letters: T tokens, K input features, N output features, C outlier features.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.model.layers.compilation import fused_loop
from trainer.model.layers.int8_matmul import (
    Matrix,
    exact_input_gradient,
    frozen_matmul,
    scale_rows_and_columns,
)
from trainer.model.layers.quantization import INT8_MAX


@cache
def _functional() -> Any:
    """``bitsandbytes.functional``, imported on first use: the import takes seconds."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def missing_library() -> str | None:
    """Reason why bitsandbytes cannot be imported; None if it can."""
    try:
        _functional()
    except (ImportError, OSError, RuntimeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def bitsandbytes_matmul(x: Tensor, matrix: Matrix, threshold: float) -> Tensor:
    """Compute ``x @ W.T`` with LLM.int8(); the input-gradient uses the dequantized weight.

    Args:
        threshold: a feature is multiplied with the dequantized weight if its magnitude reaches
            this value for any token. Unlike in ``int8_matmul``, the result for a token therefore
            depends on the other tokens, within the rounding error.
    """
    if x.numel() == 0:
        return frozen_matmul(x, matrix)
    y_TN: Tensor = _BitsandbytesMatmul.apply(x.flatten(0, -2), matrix, threshold)
    return y_TN.unflatten(0, x.shape[:-1])


class _BitsandbytesMatmul(torch.autograd.Function):
    """Forward and input-gradient as in bitsandbytes' ``MatMul8bitLt``, without saved tensors."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, matrix: Matrix, threshold: float) -> Tensor:
        ctx.matrix = matrix
        weight_NK, scale_N = matrix()
        assert scale_N is not None
        rows_TK, functional = x_TK.detach(), _functional()
        # The kernel reads float16. Values beyond the float16 range become infinite, thus outliers.
        int8_TK, absmax_T, features_C = functional.int8_vectorwise_quant(
            rows_TK.half().contiguous(), threshold
        )
        product_TN = functional.int8_linear_matmul(int8_TK, weight_NK)
        # The kernel's row maximum ignores NaN; zero times the row sum propagates it.
        nan_T = rows_TK.sum(1, dtype=torch.float32) * 0
        scale_T1 = (absmax_T / INT8_MAX + nan_T)[:, None]
        # int8_mm_dequant is not used: it returns float16, which overflows beyond 65,504.
        scale = fused_loop(scale_rows_and_columns, product_TN)
        y_TN = scale(product_TN, scale_T1, scale_N, x_TK.dtype)
        if features_C is not None and len(features_C) > 0:
            exact_TN = rows_TK[:, features_C] @ weight_NK[:, features_C].to(x_TK.dtype).T
            y_TN = y_TN + (exact_TN * scale_N).to(x_TK.dtype)
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, None, None]:
        return exact_input_gradient(ctx, dy_TN), None, None
