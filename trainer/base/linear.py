"""A linear layer whose weight never changes, and which therefore saves no input.

``dx = dy @ W`` needs the weight alone, so nothing but a reference to the layer is kept between
forward and backward. ZeRO-3 frees the weight after forward and gathers it again before backward;
reading it through the layer, not through a saved tensor, is what lets that happen.

Shape letters: T tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.base.quantization import INT8_MAX
from trainer.errors import BadInput

#: Below this hidden size an integer product saves less than quantising its operands costs.
INT8_MATMUL_MIN_HIDDEN = 512
#: Keeps the quotient of a row of zeros finite.
TINY = 1e-30


def absmax_name(parameter: str) -> str:
    """The buffer that holds the row scales of a quantised parameter of the same module."""
    return "absmax" if parameter == "weight" else f"{parameter}_absmax"


class FrozenLinear(nn.Module):
    """``y = x @ W.T + bias`` with a weight stored as int8 rows or in a float type.

    Attributes:
        weight: Parameter [N, K], int8 or float, ``requires_grad=False``. ZeRO-3 shards it as it is.
        absmax: fp32 buffer [N], present when the weight is int8.
        bias: Parameter [N] or None.
        transposed: parameters that the checkpoint stores as [K, N].
        int8_matmul: multiply int8 by int8 instead of dequantising the weight.
    """

    absmax: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        quantized: bool,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.int8_matmul = False
        self.in_features, self.out_features = in_features, out_features
        self.transposed = frozenset({"weight"} if transposed else ())
        dtype = torch.int8 if quantized else None
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device="meta"), requires_grad=False
        )
        absmax = torch.empty(out_features, dtype=torch.float32, device="meta")
        self.register_buffer("absmax", absmax if quantized else None)
        self.bias = (
            nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False)
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        in_int8 = self.int8_matmul and self.absmax is not None
        y = int8_matmul(x, self.matrix) if in_int8 else frozen_matmul(x, self.matrix)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        stored = "int8" if self.absmax is not None else str(self.weight.dtype)
        return f"{self.in_features}, {self.out_features}, stored={stored}"

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """The weight as it lies in memory now, and what each output feature is multiplied by."""
        return self.weight, None if self.absmax is None else self.absmax / INT8_MAX


#: Gives a weight [N, K] and, where it is int8, its scales [N].
Matrix = Callable[[], tuple[Tensor, Tensor | None]]


def frozen_matmul(x: Tensor, matrix: Matrix) -> Tensor:
    """``x @ W.T``. The weight is asked for in forward and again in backward, never kept."""
    y: Tensor = _FrozenMatmul.apply(x, matrix)
    return y


class _FrozenMatmul(torch.autograd.Function):
    """Dequantise-then-multiply, exact to the stored weights.

    The scale belongs to an output feature, so it multiplies ``y`` in forward and ``dy`` in
    backward; the [N, K] matrix itself is only cast, never scaled.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        weight_NK, scale_N = matrix()
        y = x @ weight_NK.to(x.dtype).T
        return y if scale_N is None else (y * scale_N).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        weight_NK, scale_N = ctx.matrix()
        if scale_N is not None:
            dy = (dy * scale_N).to(dy.dtype)
        return dy @ weight_NK.to(dy.dtype), None


def int8_matmul(x: Tensor, matrix: Matrix) -> Tensor:
    """``x @ W.T`` with both factors in int8; the gradient of x too, from the same int8 matrix."""
    y: Tensor = _Int8Matmul.apply(x, matrix)
    return y


class _Int8Matmul(torch.autograd.Function):
    """Both products from one int8 matrix, activations and output gradients quantised row by row.

    ``y = int_mm(q(x), W.T) * s_x * s_W`` (LLM.int8(), arXiv 2208.07339, section 2.1, without its
    outlier part) and ``dx = int_mm(q(dy * s_W), W) * s``: an input-gradient in 8 bits trains as
    well (SwitchBack, arXiv 2304.13013, section 2). Integer sums are exact, so the error is
    that of the two roundings, about 1% of a random row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        weight_NK, scale_N = matrix()
        assert scale_N is not None
        steps = _steps()
        x_TK, scale_T1 = steps.quantize(x.flatten(0, -2))
        product_TN = torch._int_mm(x_TK, weight_NK.T)
        return steps.scale_both(product_TN, scale_T1, scale_N, x).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        weight_NK, scale_N = ctx.matrix()
        steps = _steps()
        dy_TN, scale_T1 = steps.quantize_scaled(dy.flatten(0, -2), scale_N)
        product_TK = torch._int_mm(dy_TN, weight_NK)
        return steps.scale_rows(product_TK, scale_T1, dy).unflatten(0, dy.shape[:-1]), None


class _Steps:
    """What stands around an integer product, each fused into one pass over its operand."""

    def __init__(self) -> None:
        # One shape-agnostic graph each, compiled on first use; unfused they take as long as the
        # integer product itself.
        self.quantize = torch.compile(_quantize, dynamic=True)
        self.quantize_scaled = torch.compile(_quantize_scaled, dynamic=True)
        self.scale_both = torch.compile(_scale_both, dynamic=True)
        self.scale_rows = torch.compile(_scale_rows, dynamic=True)


@cache
def _steps() -> _Steps:
    return _Steps()


def _quantize(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and the fp32 scale of each, [T, 1], which carries on what is not finite."""
    x_TK = x_TK.float()
    scale_T1 = x_TK.abs().amax(-1, keepdim=True) / INT8_MAX
    return torch.round(x_TK / scale_T1.clamp_min(TINY)).to(torch.int8), scale_T1


def _quantize_scaled(dy_TN: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    return _quantize(dy_TN.float() * scale_N)


def _scale_both(product_TN: Tensor, scale_T1: Tensor, scale_N: Tensor, like: Tensor) -> Tensor:
    return (product_TN.float() * scale_T1 * scale_N).to(like.dtype)


def _scale_rows(product_TK: Tensor, scale_T1: Tensor, like: Tensor) -> Tensor:
    return (product_TK.float() * scale_T1).to(like.dtype)


def resolve_matmul(setting: str, quantization: str, device: torch.device, hidden_size: int) -> str:
    """``base.matmul`` with ``auto`` resolved: int8 where that was measured to be faster.

    Raises:
        BadInput: if int8 is asked for where there are no int8 weights, or on a device that it has
            not been proven on.
    """
    fast = device.type == "cpu" and torch.cpu._is_vnni_supported()
    if setting == "auto":
        wide = quantization == "int8" and hidden_size >= INT8_MATMUL_MIN_HIDDEN
        return "int8" if fast and wide else "dequantize"
    if setting == "int8" and quantization != "int8":
        raise BadInput(
            f"base.matmul: int8 needs int8 weights, but base.quantization is {quantization}; "
            "use base.quantization=int8 or base.matmul=dequantize"
        )
    if setting == "int8" and device.type != "cpu":
        raise BadInput(
            f"base.matmul: int8 is not supported on {device.type} yet; use auto or dequantize"
        )
    return setting


def multiply_in_int8(model: nn.Module) -> None:
    """Let every quantised linear layer multiply in int8; stacked experts stay exact."""
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.int8_matmul = True
