"""A linear layer whose weight never changes, and which therefore saves no input.

``dx = dy @ W`` needs the weight alone, so nothing but a reference to the layer is kept between
forward and backward. ZeRO-3 frees the weight after forward and gathers it again before backward;
reading it through the layer, not through a saved tensor, is what lets that happen.

Shape letters: T tokens, K input features, N output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.base.quantization import INT8_MAX


class FrozenLinear(nn.Module):
    """``y = x @ W.T + bias`` with a weight stored as int8 rows or in a float type.

    Attributes:
        weight: Parameter [N, K], int8 or float, ``requires_grad=False``. ZeRO-3 shards it as it is.
        absmax: fp32 buffer [N], present when the weight is int8.
        bias: Parameter [N] or None.
    """

    absmax: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, quantized: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
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
        y: Tensor = _FrozenMatmul.apply(x, self)
        return y

    def extra_repr(self) -> str:
        stored = "int8" if self.absmax is not None else str(self.weight.dtype)
        return f"{self.in_features}, {self.out_features}, stored={stored}"

    def scale_N(self) -> Tensor | None:
        """What an output feature of the integer product is multiplied by; None if not quantised."""
        return None if self.absmax is None else self.absmax / INT8_MAX


class _FrozenMatmul(torch.autograd.Function):
    """Dequantise-then-multiply, exact to the stored weights.

    The scale belongs to an output feature, so it multiplies ``y`` in forward and ``dy`` in
    backward; the [N, K] matrix itself is only cast, never scaled.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        y = x @ layer.weight.to(x.dtype).T
        scale_N = layer.scale_N()
        if scale_N is not None:
            y = (y * scale_N).to(x.dtype)
        return y if layer.bias is None else y + layer.bias.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        layer: FrozenLinear = ctx.layer
        if not ctx.needs_input_grad[0]:
            return None, None
        scale_N = layer.scale_N()
        if scale_N is not None:
            dy = (dy * scale_N).to(dy.dtype)
        return dy @ layer.weight.to(dy.dtype), None


class FrozenEmbedding(nn.Module):
    """Word embeddings kept in the checkpoint's type and read in the compute type."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device="meta"), requires_grad=False
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        return nn.functional.embedding(token_ids, self.weight).to(self.dtype)
