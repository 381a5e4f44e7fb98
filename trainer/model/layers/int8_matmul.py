"""Products with a frozen matrix: dequantized, in int8 of one or two terms, and without outliers.

``dx = dy @ W`` needs only the weight, and autograd saves a function that returns the weight instead
of the tensor. ZeRO-3 frees the weight after forward and gathers it again before backward; saving
the tensor would keep it in memory.

Shape letters: T tokens, K input features, N output features, C outlier features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.model.layers.compilation import fused_loop
from trainer.model.layers.float_matmul import padded, times_transposed
from trainer.model.layers.quantization import INT8_MAX

#: Smallest divisor, for rows of zeros.
TINY = 1e-30
#: One int8 step of the first term of an activation, in steps of the second.
SECOND_TERM = 2 * INT8_MAX
#: Largest number of int8 products whose sum always fits in int32.
MAX_INNER = (2**31 - 1) // int(INT8_MAX) ** 2
#: On a GPU, sizes are padded to multiples of this: ``torch._int_mm`` requires 8; 16 is faster.
ALIGNED = 16
#: Minimum number of rows on a GPU: ``torch._int_mm`` requires more than 16.
MIN_ROWS = 32

#: Returns a weight [N, K] and, if it is int8, its scales [N].
Matrix = Callable[[], tuple[Tensor, Tensor | None]]
#: Computes ``x @ W.T``.
Product = Callable[[Tensor, Matrix], Tensor]
#: Returns the number of int8 terms of an activation in the next product: 1 or 2.
Terms = Callable[[], int]


def one_term() -> int:
    return 1


def one_term_for_gradients() -> int:
    """One term in training, where speed counts; two where no gradient is recorded."""
    return 1 if torch.is_grad_enabled() else 2


def two_terms() -> int:
    return 2


def frozen_matmul(x: Tensor, matrix: Matrix) -> Tensor:
    """Compute ``x @ W.T`` with the stored weight, dequantized if it is int8."""
    # Reshaped here: OLMo modifies the result in place, which views from a Function do not allow.
    y_TN: Tensor = _FrozenMatmul.apply(x.flatten(0, -2), matrix)
    return y_TN.unflatten(0, x.shape[:-1])


class _FrozenMatmul(torch.autograd.Function):
    """The scale of an output feature multiplies ``y`` in forward and ``dy`` in backward.

    The [N, K] matrix itself is only cast.
    """

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        weight_NK, scale_N = matrix()
        y_TN = times_transposed(x_TK, weight_NK.to(x_TK.dtype))
        return y_TN if scale_N is None else (y_TN * scale_N).to(x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, None]:
        return exact_input_gradient(ctx, dy_TN), None


def exact_input_gradient(ctx: Any, dy_TN: Tensor) -> Tensor | None:
    """``dy @ W`` for the weight that ``ctx.matrix`` returns; None if x needs no gradient."""
    if not ctx.needs_input_grad[0]:
        return None
    weight_NK, scale_N = ctx.matrix()
    if scale_N is not None:
        dy_TN = (dy_TN * scale_N).to(dy_TN.dtype)
    return times_transposed(dy_TN, weight_NK.to(dy_TN.dtype).T)


def int8_matmul(
    x: Tensor, matrix: Matrix, threshold: float | None = None, terms: Terms = one_term
) -> Tensor:
    """Compute ``x @ W.T`` and its input-gradient with both factors in int8.

    Args:
        threshold: values of x with a larger magnitude are multiplied by the dequantized weight
            (LLM.int8(), arXiv 2208.07339, section 3); None: all values are quantized.
        terms: 1: x is rounded to int8. 2: the remainder is rounded to int8, too, and x has about
            16 bits, for a second integer product. The gradient of y always has one term.
    """
    # Reshaped as in ``frozen_matmul``.
    y_TN: Tensor = _Int8Matmul.apply(x.flatten(0, -2), matrix, threshold, terms() == 2)
    return y_TN.unflatten(0, x.shape[:-1])


class _Int8Matmul(torch.autograd.Function):
    """Forward and input-gradient from one int8 matrix, with x and dy quantized row by row.

    ``y = int_mm(q(x), W.T) * s_x * s_W`` (LLM.int8(), arXiv 2208.07339, section 2.1) and
    ``dx = int_mm(q(dy * s_W), W) * s`` (SwitchBack, arXiv 2304.13013, section 2, also trains with
    8-bit input-gradients). Integer sums are exact, so only the two roundings cause errors, about
    1% for a Gaussian row, and more for a row with outliers. A second term of x divides the error of
    x by 254, so that the stored weights alone decide the result.

    With a threshold, the product of the outliers is added in forward. The paper treats a feature
    as an outlier for all rows of a batch; here each row separates only its own outliers, so that
    its result does not depend on other rows. The input-gradient is the plain int8 product.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, matrix: Matrix, threshold: float | None, twice: bool
    ) -> Tensor:
        ctx.matrix = matrix
        weight_NK, scale_N = matrix()
        assert scale_N is not None
        # Detached: requires_grad is a compilation guard, which would cause a second compilation.
        rows_TK = x_TK.detach()
        if threshold is None:
            int8_TK, scale_T1 = fused_loop(quantize, rows_TK)(rows_TK, twice)
        else:
            int8_TK, scale_T1, is_outlier_K = fused_loop(_quantize_inliers, rows_TK)(
                rows_TK, threshold
            )
        product_TN = int_product(int8_TK, weight_NK.T)
        scale = fused_loop(scale_rows_and_columns, product_TN)
        y_TN = scale(product_TN, scale_T1, scale_N, x_TK.dtype, twice)
        if threshold is not None:
            features_C = is_outlier_K.nonzero().flatten()
            if len(features_C) > 0:
                large_TC = _beyond(rows_TK[:, features_C], threshold)
                exact_TN = large_TC @ weight_NK[:, features_C].to(x_TK.dtype).T
                y_TN = y_TN + (exact_TN * scale_N).to(x_TK.dtype)
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight_NK, scale_N = ctx.matrix()
        int8_TN, scale_T1 = fused_loop(quantize_scaled, dy_TN)(dy_TN, scale_N)
        product_TK = int_product(int8_TN, weight_NK)
        dx_TK = fused_loop(scale_rows, product_TK)(product_TK, scale_T1, dy_TN.dtype)
        return dx_TK, None, None, None


def int_product(a_TK: Tensor, b_KN: Tensor) -> Tensor:
    """Exact product of two int8 matrices of any memory layout, int32 [T, N]."""
    return torch._int_mm(a_TK, b_KN) if a_TK.is_cpu else aligned_int_product(a_TK, b_KN)


def aligned_int_product(a_TK: Tensor, b_KN: Tensor) -> Tensor:
    """``int_product`` on a GPU, whose kernel requires enough rows, aligned sizes, column-major b.

    Some GPUs reject a row-major b, as in an input-gradient (CUBLAS_STATUS_NOT_SUPPORTED; see
    torch's test of ``_int_mm``). A row-major b is therefore copied: one byte per weight, where
    ``dequantize`` writes two.
    """
    num_rows, num_columns = a_TK.shape[0], b_KN.shape[1]
    inner = _aligned(a_TK.shape[1])
    a_TK = padded(a_TK, max(MIN_ROWS, _aligned(num_rows)), inner)
    b_NK = padded(b_KN.T, _aligned(num_columns), inner)
    return torch._int_mm(a_TK.contiguous(), b_NK.contiguous().T)[:num_rows, :num_columns]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def quantize(x_TK: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
    """int8 rows and their fp32 scales [T, 1]; NaN or infinite values propagate to the scale.

    Returns:
        [T, K], or [2 T, K] if ``twice``: the rows, then their remainders in units of
        ``scale / SECOND_TERM``.
    """
    x_TK = x_TK.float()
    scale_T1 = x_TK.abs().amax(-1, keepdim=True) / INT8_MAX
    steps_TK = x_TK / scale_T1.clamp_min(TINY)
    first_TK = torch.round(steps_TK)
    if not twice:
        return first_TK.to(torch.int8), scale_T1
    second_TK = torch.round((steps_TK - first_TK) * SECOND_TERM)
    return torch.cat([first_TK, second_TK]).to(torch.int8), scale_T1


def _quantize_inliers(x_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize`` with outliers set to zero; also returns which features [K] have outliers."""
    beyond_TK = x_TK.abs() > threshold  # False for NaN, which the scale propagates
    return *quantize(torch.where(beyond_TK, 0.0, x_TK)), beyond_TK.any(0)


def _beyond(x_TC: Tensor, threshold: float) -> Tensor:
    return torch.where(x_TC.abs() > threshold, x_TC, 0.0)


def quantize_scaled(dy_TN: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(dy_TN.float() * scale_N)


def scale_rows_and_columns(
    product_TN: Tensor, scale_T1: Tensor, scale_N: Tensor, dtype: torch.dtype, twice: bool = False
) -> Tensor:
    """Dequantize an integer product of ``quantize``, [T, N] or [2 T, N], to [T, N]."""
    sum_TN = product_TN[: len(scale_T1)].float()
    if twice:
        sum_TN = sum_TN + product_TN[len(scale_T1) :].float() / SECOND_TERM
    return (sum_TN * scale_T1 * scale_N).to(dtype)


def scale_rows(product_TK: Tensor, scale_T1: Tensor, dtype: torch.dtype) -> Tensor:
    return (product_TK.float() * scale_T1).to(dtype)
