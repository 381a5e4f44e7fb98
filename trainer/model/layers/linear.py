"""Frozen linear layer, which saves no input for backward.

The product function calls ``FrozenLinear.matrix`` for the weight in forward and in backward.

Shape letters: K input features, N output features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.layers.int8_matmul import Product, frozen_matmul
from trainer.model.layers.quantization import INT8_MAX


def absmax_name(parameter: str) -> str:
    """Name of the buffer with the row scales of a quantized parameter of the same module."""
    return "absmax" if parameter == "weight" else f"{parameter}_absmax"


class FrozenLinear(nn.Module):
    """``y = x @ W.T + bias`` with a weight stored as int8 rows or in a float type.

    Attributes:
        weight: Parameter [N, K], int8 or float, ``requires_grad=False``; sharded as stored.
        absmax: fp32 buffer [N] if the weight is int8, else None.
        transposed: names of parameters that the checkpoint stores as [K, N].
        product: computes ``x @ W.T``; set by ``trainer.model.layers.matmul_selection``.
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
        self.product: Product = frozen_matmul
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
        y = self.product(x, self.matrix)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        stored = "int8" if self.absmax is not None else str(self.weight.dtype)
        return f"{self.in_features}, {self.out_features}, stored={stored}"

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """The current weight and the scale of each output feature."""
        return self.weight, None if self.absmax is None else self.absmax / INT8_MAX
