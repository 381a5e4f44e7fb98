"""A linear layer whose weight never changes, and which therefore saves no input.

``dx = dy @ W`` needs the weight alone, so nothing but a reference to the layer is kept between
forward and backward. ZeRO-3 frees the weight after forward and gathers it again before backward;
reading it through the layer, not through a saved tensor, is what lets that happen.

Shape letters: T tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.base.quantization import INT8_MAX


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
        y = frozen_matmul(x, self.matrix)
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


class FrozenEmbedding(nn.Module):
    """Word embeddings kept in the checkpoint's type, or in int8, and read in the compute type.

    Attributes:
        absmax: fp32 buffer [V], present when the weight is int8.
        scale: what every embedding is multiplied by (Gemma: the root of the hidden size), rounded
            to the compute type as the model was trained with it.
    """

    absmax: Tensor | None

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.scale = torch.tensor(scale, device="cpu").to(dtype).item()
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device="meta"), requires_grad=False
        )
        self.register_buffer("absmax", None)

    def forward(self, token_ids: Tensor) -> Tensor:
        embedded = nn.functional.embedding(token_ids, self.weight)
        if self.absmax is not None:
            embedded = embedded.float() * (self.absmax / INT8_MAX)[token_ids, None]
        embedded = embedded.to(self.dtype)
        return embedded if self.scale == 1.0 else embedded * self.scale


def store_int8(layer: FrozenLinear | FrozenEmbedding) -> None:
    """Make the weight of a layer on ``meta`` an int8 one."""
    shape = layer.weight.shape
    weight = torch.empty(shape, dtype=torch.int8, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.absmax = torch.empty(shape[0], dtype=torch.float32, device="meta")
