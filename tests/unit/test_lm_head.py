"""The sliced loss against cross-entropy over all logits, and its peak memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.model.layers.int8_matmul import Product, frozen_matmul, int8_matmul
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.quantization import dequantize_rows, quantize_rows
from trainer.model.layers.vocab_parallel import VocabScan
from trainer.packing import activation_memory

N, H, V = 37, 24, 1000

#: options of a head
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.0625},
    "capped": {"softcap": 3.0},
    "biased": {"bias": True},
    "int8": {"int8": True},
    "all": {"scale": 0.5, "softcap": 3.0, "bias": True, "int8": True},
}


def make_head(
    v: int = V,
    h: int = H,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    int8: bool = False,
) -> FrozenHead:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, h, generator=generator)
    layer = FrozenHead(h, v, bias, quantized=int8)
    layer.scale, layer.softcap = scale, softcap
    if int8:
        weight, layer.absmax = quantize_rows(weight)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.randn(v, generator=generator), requires_grad=False)
    return layer


def whole_logits(layer: FrozenHead, hidden_NH: Tensor) -> Tensor:
    """All logits at once, [N, V] in the type of ``hidden_NH``."""
    weight = layer.weight.data
    if layer.absmax is not None:
        weight = dequantize_rows(weight, layer.absmax)
    logits = hidden_NH @ weight.to(hidden_NH.dtype).T
    if layer.bias is not None:
        logits = logits + layer.bias.to(hidden_NH.dtype)
    logits = logits * layer.scale
    return logits if layer.softcap is None else torch.tanh(logits / layer.softcap) * layer.softcap


def unsliced(layer: FrozenHead, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy over all logits at once, in the type of ``hidden_NH``."""
    return cross_entropy(whole_logits(layer, hidden_NH), labels_N, reduction="none")


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, labels, and what each label's loss weighs."""
    generator = torch.Generator().manual_seed(1)
    labels_N = torch.randint(0, V, (N,), generator=generator)
    labels_N[:2] = torch.tensor([0, V - 1])
    hidden_NH = torch.randn(N, H, generator=generator)
    return hidden_NH, labels_N, torch.rand(N, generator=generator)


def slice_by(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(activation_memory, "LOGITS_BYTES", 1)
    monkeypatch.setattr(activation_memory, "MIN_COLUMNS", columns)


@pytest.mark.parametrize("columns", [40, 64, 333, V])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_equal_the_full_vocabulary(
    kind: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slice_by(monkeypatch, columns)
    layer, (hidden_NH, labels_N, weight_N) = make_head(**KINDS[kind]), problem()
    ours, exact = hidden_NH.clone().requires_grad_(), hidden_NH.double().requires_grad_()
    nll_N, wanted_N = layer(ours, labels_N).loss_N, unsliced(layer, exact, labels_N)
    (nll_N * weight_N).sum().backward()
    (wanted_N * weight_N).sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(nll_N.double(), wanted_N, rtol=1e-6, atol=2e-6)
    error = (ours.grad - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 1e-6


def test_likely_labels_keep_their_digits_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where p is nearly 1, ``p - 1`` of rounded numbers is noise."""
    slice_by(monkeypatch, 64)
    layer, (_, labels_N, _) = make_head(), problem()
    hidden_NH = (layer.weight[labels_N] * 0.8).bfloat16()
    layer.weight.data = layer.weight.data.bfloat16()
    ours, exact = hidden_NH.clone().requires_grad_(), hidden_NH.double().requires_grad_()
    layer(ours, labels_N).loss_N.sum().backward()
    wanted_N = unsliced(layer, exact, labels_N)
    wanted_N.sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert wanted_N.median() < 0.05
    errors_N = (ours.grad - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert errors_N.median() < 0.05


def test_int8_product_is_within_rounding_error(monkeypatch: pytest.MonkeyPatch) -> None:
    slice_by(monkeypatch, 128)
    layer, (hidden_NH, labels_N, _) = make_head(int8=True), problem()
    layer.product = int8_matmul
    ours, exact = hidden_NH.clone().requires_grad_(), hidden_NH.clone().requires_grad_()
    nll_N, wanted_N = layer(ours, labels_N).loss_N, unsliced(layer, exact, labels_N)
    nll_N.sum().backward()
    wanted_N.sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert (nll_N - wanted_N).abs().mean() < 0.02 * wanted_N.mean()
    assert (ours.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            # A view allocates nothing.
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_peak_is_bounded_for_a_large_vocabulary(
    grad: bool, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256k tokens: neither all logits nor a copy of the head in fp32 are allocated."""
    monkeypatch.setattr(activation_memory, "LOGITS_BYTES", 4 << 20)
    vocab_size, num_labels = 256_000, 256
    layer = make_head(vocab_size, 8)
    layer.weight.data = layer.weight.data.to(stored)
    hidden_NH = torch.randn(num_labels, 8, requires_grad=grad)
    labels_N = torch.randint(0, vocab_size, (num_labels,))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        nll_N = layer(hidden_NH, labels_N).loss_N
        if grad:
            nll_N.sum().backward()
    assert nll_N.requires_grad == grad
    assert largest.num_bytes <= 4 << 20  # whole logits: 262 MB
    rows = [tensor for tensor in saved if tensor.shape == hidden_NH.shape]
    assert sum(tensor.numel() for tensor in saved) <= num_labels * 8
    assert len(rows) == int(grad)


def test_logits_in_fp32_are_not_copied() -> None:
    hidden_NH, _, _ = problem()
    part = make_head().block(None, hidden_NH.device).logit_slice(hidden_NH, 0, 64, True)
    assert part.logits_NC.data_ptr() == part.product_NC.data_ptr()


@pytest.mark.parametrize("labels", [1, 500, 2048, 3000, 100_000])
def test_slices_on_a_cpu_have_few_widths(labels: int) -> None:
    columns = activation_memory.logit_columns(labels, on_cpu=True)
    assert columns in (1024, 2048, 4096, 8192)
    assert columns <= activation_memory.logit_columns(labels, on_cpu=False)
    if labels <= 4096:
        assert 4 * labels * columns <= activation_memory.LOGITS_BYTES
    scan = VocabScan(make_head().block(None, torch.device("cpu")), labels, torch.device("cpu"))
    assert scan._columns == columns


@pytest.mark.parametrize("product", [frozen_matmul, int8_matmul])
def test_a_frozen_linear_saves_no_input(product: Product) -> None:
    layer = FrozenLinear(64, 32, bias=True, quantized=True)
    weight, layer.absmax = quantize_rows(torch.randn(32, 64))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(torch.zeros(32), requires_grad=False)
    layer.product = product
    x = torch.randn(40, 64, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x).sum().backward()
    assert saved == []
    assert x.grad is not None
