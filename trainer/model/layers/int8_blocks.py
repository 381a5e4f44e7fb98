"""Int8 products of whole blocks: products of one input, and a gated MLP.

Between two integer products there is one loop over memory. The input of several products is
quantized once, and their input-gradients are summed while they are scaled. Numbers equal those of
separate products (``int8_matmul``), except for the order of that sum.

Shape letters: T tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.model.layers.activations import gated, gated_backward
from trainer.model.layers.compilation import fused_loop
from trainer.model.layers.int8_matmul import (
    Matrix,
    Terms,
    int_product,
    quantize,
    quantize_scaled,
    scale_rows,
    scale_rows_and_columns,
)


def int8_products(x: Tensor, matrices: Sequence[Matrix], terms: Terms) -> tuple[Tensor, ...]:
    """Compute ``x @ W.T`` for several int8 matrices, as ``int8_matmul`` without a threshold."""
    ys_TN: tuple[Tensor, ...] = _Int8Products.apply(x.flatten(0, -2), tuple(matrices), terms() == 2)
    return tuple(y_TN.unflatten(0, x.shape[:-1]) for y_TN in ys_TN)


def int8_gated_mlp(
    x: Tensor, gate: Matrix, up: Matrix, down: Matrix, kind: str, terms: Terms
) -> Tensor:
    """Compute ``down(act(gate(x)) * up(x))`` with three int8 matrices.

    Saves the outputs of ``gate`` and ``up``.

    Args:
        kind: activation, as in ``activations.ACTIVATIONS``.
        terms: as in ``int8_matmul``.
    """
    y_TK: Tensor = _Int8GatedMLP.apply(x.flatten(0, -2), gate, up, down, kind, terms() == 2)
    return y_TK.unflatten(0, x.shape[:-1])


class SharedInput:
    """Products of layers that a module calls one after the other with the same inputs.

    The first call with an input computes the products of all layers, and the next ones return them.
    A module may give each layer two inputs in turn, the halves of its own.
    """

    def __init__(self, matrices: Sequence[Matrix], terms: Terms) -> None:
        self._matrices = tuple(matrices)
        self._terms = terms
        self._pending: list[tuple[Tensor, dict[int, Tensor]]] = []

    def product(self, index: int, x: Tensor, _: Matrix) -> Tensor:
        """Return ``x @ W.T`` for the layer with this index, whose matrix is known."""
        known = (
            i for i, (one, outputs) in enumerate(self._pending) if one is x and index in outputs
        )
        place = next(known, None)
        if place is None:
            products = int8_products(x, self._matrices, self._terms)
            self._pending = [*self._pending[-1:], (x, dict(enumerate(products)))]
            place = len(self._pending) - 1
        outputs = self._pending[place][1]
        y = outputs.pop(index)
        if not outputs:  # earlier ones were left when memory ran out
            self._pending = self._pending[place + 1 :]
        return y


class _Int8Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, matrices: tuple[Matrix, ...], twice: bool
    ) -> tuple[Tensor, ...]:
        ctx.matrices, ctx.dtype = matrices, x_TK.dtype
        ctx.set_materialize_grads(False)
        int8_TK, scale_T1 = fused_loop(quantize, x_TK)(x_TK.detach(), twice)
        products, scales = [], []
        for matrix in matrices:
            weight_NK, scale_N = _int8(matrix)
            products.append(int_product(int8_TK, weight_NK.T))
            scales.append(scale_N)
        ys: tuple[Tensor, ...] = fused_loop(_scale_each, products[0])(
            products, scale_T1, scales, x_TK.dtype, twice
        )
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        products, scales = [], []
        for matrix, dy_TN in zip(ctx.matrices, grads, strict=True):
            if dy_TN is not None:
                weight_NK, scale_N = _int8(matrix)
                int8_TN, scale_T1 = fused_loop(quantize_scaled, dy_TN)(dy_TN, scale_N)
                products.append(int_product(int8_TN, weight_NK))
                scales.append(scale_T1)
        return _sum_scaled(products, scales, ctx.dtype) if products else None, None, None


class _Int8GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, gate: Matrix, up: Matrix, down: Matrix, kind: str, twice: bool
    ) -> Tensor:
        ctx.matrices, ctx.kind = (gate, up, down), kind
        int8_TK, scale_T1 = fused_loop(quantize, x_TK)(x_TK.detach(), twice)
        (gate_NK, gate_scale_N), (up_NK, up_scale_N) = _int8(gate), _int8(up)
        gate_product_TN = int_product(int8_TK, gate_NK.T)
        gate_TN, up_TN, int8_TN, inner_scale_T1 = fused_loop(_gate_and_quantize, gate_product_TN)(
            gate_product_TN,
            int_product(int8_TK, up_NK.T),
            scale_T1,
            gate_scale_N,
            up_scale_N,
            x_TK.dtype,
            kind,
            twice,
        )
        ctx.save_for_backward(gate_TN, up_TN)
        down_KN, down_scale_K = _int8(down)
        y_TK: Tensor = fused_loop(scale_rows_and_columns, x_TK)(
            int_product(int8_TN, down_KN.T), inner_scale_T1, down_scale_K, x_TK.dtype, twice
        )
        return y_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TK: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        gate_TN, up_TN = ctx.saved_tensors
        (gate_NK, gate_scale_N), (up_NK, up_scale_N), (down_KN, down_scale_K) = map(
            _int8, ctx.matrices
        )
        int8_TK, scale_T1 = fused_loop(quantize_scaled, dy_TK)(dy_TK, down_scale_K)
        gate_int8_TN, of_gate_T1, up_int8_TN, of_up_T1 = fused_loop(
            _gate_backward_and_quantize, gate_TN
        )(
            int_product(int8_TK, down_KN),
            scale_T1,
            gate_TN,
            up_TN,
            gate_scale_N,
            up_scale_N,
            ctx.kind,
        )
        products = [int_product(gate_int8_TN, gate_NK), int_product(up_int8_TN, up_NK)]
        return _sum_scaled(products, [of_gate_T1, of_up_T1], dy_TK.dtype), *(None,) * 5


def _int8(matrix: Matrix) -> tuple[Tensor, Tensor]:
    weight_NK, scale_N = matrix()
    assert scale_N is not None, "these products are for int8 matrices"
    return weight_NK, scale_N


def _scale_each(
    products: list[Tensor],
    scale_T1: Tensor,
    scales: list[Tensor],
    dtype: torch.dtype,
    twice: bool,
) -> tuple[Tensor, ...]:
    return tuple(
        scale_rows_and_columns(product_TN, scale_T1, scale_N, dtype, twice)
        for product_TN, scale_N in zip(products, scales, strict=True)
    )


def _sum_scaled(products: list[Tensor], scales: list[Tensor], dtype: torch.dtype) -> Tensor:
    dx_TK: Tensor = fused_loop(_scale_and_sum, products[0])(products, scales, dtype)
    return dx_TK


def _scale_and_sum(products: list[Tensor], scales: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of input-gradients, each rounded to ``dtype`` as separate products are."""
    first, *rest = (scale_rows(p, s, dtype) for p, s in zip(products, scales, strict=True))
    for term in rest:
        first = first + term
    return first


def _gate_and_quantize(
    gate_product_TN: Tensor,
    up_product_TN: Tensor,
    scale_T1: Tensor,
    gate_scale_N: Tensor,
    up_scale_N: Tensor,
    dtype: torch.dtype,
    kind: str,
    twice: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_TN = scale_rows_and_columns(gate_product_TN, scale_T1, gate_scale_N, dtype, twice)
    up_TN = scale_rows_and_columns(up_product_TN, scale_T1, up_scale_N, dtype, twice)
    return gate_TN, up_TN, *quantize(gated(gate_TN, up_TN, kind), twice)


def _gate_backward_and_quantize(
    product_TN: Tensor,
    scale_T1: Tensor,
    gate_TN: Tensor,
    up_TN: Tensor,
    gate_scale_N: Tensor,
    up_scale_N: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_TN = scale_rows(product_TN, scale_T1, gate_TN.dtype)
    of_gate_TN, of_up_TN = gated_backward(grad_TN, gate_TN, up_TN, kind)
    return *quantize_scaled(of_gate_TN, gate_scale_N), *quantize_scaled(of_up_TN, up_scale_N)
