"""Products of fp32 matrices with both of torch's libraries."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers.counters import FlopCounter
from trainer.model.layers import float_matmul
from trainer.model.layers.float_matmul import FEW_ROWS, ROWS, times_transposed
from trainer.model.layers.int8_matmul import frozen_matmul


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(float_matmul, "prefers_onednn", lambda: request.param)
    monkeypatch.setattr(float_matmul, "ONEDNN_MIN_ELEMENTS", 0)


@pytest.mark.parametrize("rows", [0, 1, 5, 9, 32, 40, 300, 700])
def test_both_libraries_compute_the_same_product(library, rows):
    x, weight_NK = torch.randn(rows, 48), torch.randn(70, 48)
    exact = x.double() @ weight_NK.double().T
    torch.testing.assert_close(times_transposed(x, weight_NK), exact.float(), atol=1e-5, rtol=1e-5)


def test_strided_matrices_are_multiplied(library):
    x, weight = torch.randn(6, 96)[:, ::2], torch.randn(48, 70)
    exact = x.double() @ weight.double()
    torch.testing.assert_close(times_transposed(x, weight.T), exact.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_multiplied_by_torch(library, dtype):
    x, weight_NK = torch.randn(5, 48, dtype=dtype), torch.randn(70, 48, dtype=dtype)
    assert torch.equal(times_transposed(x, weight_NK), x @ weight_NK.T)


def test_gradients_and_flops_do_not_depend_on_the_library(library):
    x, weight_NK = torch.randn(4, 8, 48, requires_grad=True), torch.randn(70, 48)
    with FlopCounter() as counter:
        y = frozen_matmul(x, lambda: (weight_NK, None))
        y.backward(torch.ones_like(y))
    assert counter.total == 2 * (2 * 32 * 48 * 70)
    expected = weight_NK.sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-5)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def test_products_in_both_directions_are_those_of_the_library(library, request):
    onednn = "onednn" in request.node.callspec.id
    x, weight_NK = torch.randn(32, 48, requires_grad=True), torch.randn(70, 48)
    with _Operators() as operators:
        frozen_matmul(x, lambda: (weight_NK, None)).sum().backward()
    assert operators.called.count("mkldnn._linear_pointwise.default") == 2 * onednn
    assert operators.called.count("aten.mm.default") == 2 * (not onednn)


def test_onednn_multiplies_few_numbers_of_rows():
    """It needs memory for every number of rows."""
    sizes = {size for number in range(1, 1200) for _, _, size in float_matmul._blocks(number)}
    assert sizes == {*ROWS, *FEW_ROWS}
    for number in range(1, 1200):
        blocks = list(float_matmul._blocks(number))
        assert [start for start, _, _ in blocks] == [0, *(stop for _, stop, _ in blocks[:-1])]
        assert blocks[-1][1] == number
        assert sum(size for _, _, size in blocks) < number + 32


def test_small_matrices_are_multiplied_by_torch(monkeypatch):
    monkeypatch.setattr(float_matmul, "prefers_onednn", lambda: True)
    x, weight_NK = torch.randn(5, 48), torch.randn(70, 48)
    assert torch.equal(times_transposed(x, weight_NK), x @ weight_NK.T)


@pytest.mark.parametrize(
    ("vendor", "capability", "preferred"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("HygonGenuine", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_the_library_follows_from_the_processor(
    monkeypatch, tmp_path, vendor, capability, preferred
):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: AuthenticAMD\n")
    monkeypatch.setattr(float_matmul, "CPU_INFO", str(info))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    float_matmul.prefers_onednn.cache_clear()
    assert float_matmul.prefers_onednn() is preferred
    monkeypatch.setattr(float_matmul, "CPU_INFO", str(tmp_path / "none"))
    float_matmul.prefers_onednn.cache_clear()
    assert not float_matmul.prefers_onednn()
    float_matmul.prefers_onednn.cache_clear()
