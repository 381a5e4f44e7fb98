"""On a CUDA device: its int8 kernel in both directions, and the first steps of the quickstart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.gpu.quickstart import first_steps
from trainer.model.layers.int8_matmul import aligned_int_product
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.matmul_selection import INT8_CAPABILITY, candidates, measure, use_matmul
from trainer.model.layers.quantization import quantize_rows

HAS_INT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= INT8_CAPABILITY
pytestmark = pytest.mark.skipif(not HAS_INT8, reason="needs a CUDA device that multiplies int8")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(("t", "k", "n"), [(1, 50, 30), (17, 64, 48), (999, 4096, 1000)])
@pytest.mark.parametrize("column_major", [False, True])
def test_the_product_is_exact(t: int, k: int, n: int, column_major: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        for shape in ((t, k), (k, n))
    )
    on_gpu = b.cuda().T.contiguous().T if column_major else b.cuda()
    product = aligned_int_product(a.cuda(), on_gpu).cpu()
    assert torch.equal(product, torch._int_mm(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "outliers", "forward", "backward"),
    [
        ("int8", 1.0, 0.02, 0.02),
        ("int8", 20.0, 0.06, 0.06),
        ("int8x2", 20.0, 0.015, 0.06),
        ("int8_outliers", 20.0, 0.015, 0.06),
        ("bitsandbytes", 1.0, 0.02, 0.01),
        ("bitsandbytes", 20.0, 0.015, 0.01),
    ],
)
def test_error_against_dequantize(
    dtype: torch.dtype, kind: str, outliers: float, forward: float, backward: float
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    layer = FrozenLinear(768, 512, bias=False, quantized=True)
    weight = torch.randn(512, 768, device="cuda", generator=generator) * 0.05
    stored, layer.absmax = quantize_rows(weight)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    x = torch.randn(300, 768, device="cuda", dtype=dtype, generator=generator)
    dy = torch.randn(300, 512, device="cuda", dtype=dtype, generator=generator)
    for tensor in (x, dy):
        tensor[:, ::64] *= outliers
    x.requires_grad_()
    exact = layer(x)
    (exact_dx,) = torch.autograd.grad(exact, x, dy)
    use_matmul(layer, kind, 6.0)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    least = 1e-6 if kind == "int8x2" else 1e-4
    assert least < float((y - exact).norm() / exact.norm()) < forward
    rounds_gradient = kind != "bitsandbytes"
    assert 1e-4 * rounds_gradient <= float((dx - exact_dx).norm() / exact_dx.norm()) < backward


@pytest.mark.parametrize("kind", ["int8", "int8x2", "int8_outliers", "bitsandbytes"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_row(kind: str, value: float) -> None:
    layer = FrozenLinear(768, 512, bias=False, quantized=True)
    stored, layer.absmax = quantize_rows(torch.randn(512, 768, device="cuda"))
    layer.weight = nn.Parameter(stored, requires_grad=False)
    use_matmul(layer, kind, 6.0)
    x = torch.zeros(3, 768, device="cuda", dtype=torch.bfloat16)
    x[1, 5] = value
    is_finite = layer(x).isfinite()
    assert is_finite[0].all()
    assert not is_finite[1].any()
    assert is_finite[2].all()


def test_auto_measures() -> None:
    kinds = candidates()
    measured = measure(kinds, [(4096, 4096)], torch.bfloat16, torch.device("cuda"), 6.0)
    assert " ms" in measured.reason, measured.reason
    assert all(kind in measured.reason for kind in kinds), measured.reason


@pytest.mark.parametrize("kind", ["auto", "dequantize", "int8", "int8_outliers", "bitsandbytes"])
def test_first_steps_of_the_quickstart(tmp_path: Path, kind: str) -> None:
    first_steps(tmp_path, base__matmul=kind)
