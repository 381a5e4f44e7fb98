"""Frozen linear layers: exact and in int8, forward and input-gradient, with nothing saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.base.linear import FrozenLinear, resolve_matmul
from trainer.base.quantization import dequantize_rows, quantize_rows
from trainer.errors import BadInput

TOKENS, IN, OUT = 96, 256, 192


def make_layer(int8: bool) -> tuple[FrozenLinear, Tensor]:
    """A quantised layer, and the weight that its rows stand for."""
    generator = torch.Generator().manual_seed(0)
    stored, absmax = quantize_rows(torch.randn(OUT, IN, generator=generator) * 0.05)
    layer = FrozenLinear(IN, OUT, bias=True, quantized=True)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.absmax = absmax
    layer.bias = nn.Parameter(torch.randn(OUT, generator=generator), requires_grad=False)
    layer.int8_matmul = int8
    return layer, dequantize_rows(stored, absmax)


def activations(outliers: bool) -> tuple[Tensor, Tensor]:
    """Input and output gradient; with outliers, a few features are 20 times the others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, IN, generator=generator)
    dy = torch.randn(2, TOKENS // 2, OUT, generator=generator)
    if outliers:
        x[..., ::64] *= 20
        dy[..., ::64] *= 20
    return x.requires_grad_(), dy


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_error_of_forward_and_input_gradient(int8: bool, outliers: bool) -> None:
    layer, weight = make_layer(int8)
    x, dy = activations(outliers)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = nn.functional.linear(x, weight, layer.bias)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    # Rounding to 127 steps of the largest value: 1% of a Gaussian row, more where outliers set it.
    bound = 1e-6 if not int8 else 0.06 if outliers else 0.015
    assert relative(y, expected) < bound
    assert relative(dx, expected_dx) < bound
    if int8:
        assert relative(y, expected) > 1e-4, "this was not an int8 product"


@pytest.mark.parametrize("int8", [False, True])
def test_nothing_is_saved_for_backward(int8: bool) -> None:
    layer, _ = make_layer(int8)
    x, _ = activations(outliers=False)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert sum(saved) == 0
    node = y.grad_fn.next_functions[0][0]
    assert not any(isinstance(value, Tensor) for value in vars(node).values())


def test_int8_carries_nan_in_its_own_row_and_survives_zeros() -> None:
    layer, _ = make_layer(int8=True)
    x = torch.zeros(3, IN)
    x[1] = torch.nan
    y = layer(x)
    assert torch.equal(y[0], layer.bias)
    assert y[1].isnan().all()
    assert torch.equal(y[2], layer.bias)


def test_auto_and_refusals() -> None:
    cpu = torch.device("cpu")
    wide = "int8" if torch.cpu._is_vnni_supported() else "dequantize"
    assert resolve_matmul("auto", "int8", cpu, 4096) == wide
    assert resolve_matmul("auto", "int8", cpu, 128) == "dequantize"
    assert resolve_matmul("auto", "none", cpu, 4096) == "dequantize"
    with pytest.raises(BadInput, match=r"base\.matmul: int8 needs int8 weights"):
        resolve_matmul("int8", "none", cpu, 4096)
    with pytest.raises(BadInput, match=r"base\.matmul: int8 is not supported on cuda"):
        resolve_matmul("int8", "int8", torch.device("cuda"), 4096)
