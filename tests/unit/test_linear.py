"""Products of frozen linear layers: errors, saved tensors, selection by device and timing."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from trainer.model.layers import bitsandbytes_matmul as bitsandbytes_module
from trainer.model.layers import compilation, int8_matmul, matmul_selection
from trainer.model.layers.bitsandbytes_matmul import bitsandbytes_matmul, missing_library
from trainer.model.layers.int8_matmul import MAX_INNER, aligned_int_product
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.matmul_selection import (
    MEASURE,
    Measured,
    candidates,
    check_product,
    largest_shapes,
    measure,
    resolve_matmul,
    use_matmul,
)
from trainer.model.layers.quantization import dequantize_rows, quantize_rows
from trainer.runtime.errors import BadInput

TOKENS, IN, OUT = 96, 256, 192
THRESHOLD = 6.0
CPU = torch.device("cpu")
CPP_BUILDER = "torch._inductor.cpp_builder"
CACHE = "torch._inductor.runtime.cache_dir_utils"
HAS_LIBRARY = missing_library() is None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs bitsandbytes")
BITSANDBYTES = pytest.param("bitsandbytes", marks=needs_library)
KINDS = ["dequantize", "int8", "int8x2", "int8_outliers", BITSANDBYTES]


def make_layer(kind: str, in_features: int = IN, out_features: int = OUT) -> FrozenLinear:
    """A quantized layer with this kind of product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    stored, absmax = quantize_rows(weight)
    layer = FrozenLinear(in_features, out_features, bias=True, quantized=True)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.absmax = absmax
    layer.bias = nn.Parameter(torch.randn(out_features, generator=generator), requires_grad=False)
    assert use_matmul(layer, kind, THRESHOLD) == []
    return layer


def activations(outliers: float = 1.0) -> tuple[Tensor, Tensor]:
    """Input and output gradient; a few features are multiplied by ``outliers``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, IN, generator=generator)
    dy = torch.randn(2, TOKENS // 2, OUT, generator=generator)
    x[..., ::64] *= outliers
    dy[..., ::64] *= outliers
    return x.requires_grad_(), dy


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


def errors(kind: str, outliers: float) -> tuple[float, float]:
    """Relative errors of output and input-gradient against the dequantized weights."""
    layer = make_layer(kind)
    x, dy = activations(outliers)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert layer.absmax is not None
    weight = dequantize_rows(layer.weight, layer.absmax)
    expected = nn.functional.linear(x, weight, layer.bias)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    return relative(y, expected), relative(dx, expected_dx)


class TestErrors:
    """Rounding to 127 steps of the largest value: 1% of a Gaussian row, more where outliers set it.

    Without the outliers, the rounding error of x is as small as for a Gaussian row, relative to an
    output that the outliers make larger.
    """

    @pytest.mark.parametrize(
        ("kind", "outliers", "forward", "backward"),
        [
            ("dequantize", 1.0, 1e-6, 1e-6),
            ("dequantize", 20.0, 1e-6, 1e-6),
            ("int8", 1.0, 0.015, 0.015),
            ("int8", 20.0, 0.06, 0.06),
            ("int8x2", 1.0, 6e-5, 0.015),
            ("int8x2", 20.0, 2.4e-4, 0.06),
            ("int8_outliers", 1.0, 0.015, 0.015),
            ("int8_outliers", 20.0, 0.008, 0.06),
            pytest.param("bitsandbytes", 1.0, 0.015, 1e-6, marks=needs_library),
            pytest.param("bitsandbytes", 20.0, 0.008, 1e-6, marks=needs_library),
        ],
    )
    def test_bounds(self, kind: str, outliers: float, forward: float, backward: float) -> None:
        error, gradient_error = errors(kind, outliers)
        assert error < forward
        assert gradient_error < backward
        if kind != "dequantize":
            assert error > (1e-5 if kind == "int8x2" else 1e-4), "this was not an int8 product"

    def test_two_terms_where_no_gradient_is_recorded(self) -> None:
        x, _ = activations(20.0)
        with torch.no_grad():
            scored, expected = make_layer("int8")(x), make_layer("int8x2")(x)
        assert torch.equal(scored, expected)
        assert not torch.allclose(make_layer("int8")(x), expected, rtol=1e-3)

    @pytest.mark.parametrize("factor", [1e-20, 1e20])
    def test_two_terms_of_tiny_and_huge_rows(self, factor: float) -> None:
        x = activations()[0].detach() * factor
        x[0, 0] = 0
        layer, exact = make_layer("int8x2"), make_layer("dequantize")
        layer.bias = exact.bias = None
        assert relative(layer(x), exact(x)) < 1e-4
        assert (layer(x)[0, 0] == 0).all()

    def test_separate_outliers_reduce_the_error(self) -> None:
        assert errors("int8_outliers", 40.0)[0] < errors("int8", 40.0)[0] / 8

    def test_without_outliers_both_are_equal(self) -> None:
        x = activations()[0].clamp(-THRESHOLD, THRESHOLD)
        assert torch.equal(make_layer("int8_outliers")(x), make_layer("int8")(x))

    def test_a_row_does_not_depend_on_its_neighbours(self) -> None:
        layer = make_layer("int8_outliers")
        x, _ = activations(20.0)
        calm = torch.where(x.abs() > THRESHOLD, 0.5, x)
        beside = torch.cat([calm[:1], x[1:]])
        torch.testing.assert_close(layer(beside)[0], layer(calm)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_saved_for_backward(kind: str) -> None:
    layer = make_layer(kind)
    x, _ = activations(outliers=20.0)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert sum(saved) == 0
    node = y.grad_fn
    while not isinstance(node, torch.autograd.function.BackwardCFunction):  # bias and shape
        node = node.next_functions[0][0]
    assert not any(isinstance(value, Tensor) for value in vars(node).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_stay_in_their_row(kind: str, value: float) -> None:
    layer = make_layer(kind)
    x = torch.zeros(3, IN)
    x[1, 5] = value
    y = layer(x)
    assert torch.equal(y[0], layer.bias)
    assert not y[1].isfinite().any()
    assert torch.equal(y[2], layer.bias)


def strict_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product on CPU with the requirements of CUDA (aten/src/ATen/native/cuda/Blas.cpp)."""
    assert a.shape[0] > 16
    assert all(size > 0 and size % 8 == 0 for size in b.shape)
    assert a.is_contiguous()
    assert b.T.is_contiguous(), "row-major, which not every GPU takes"
    return PLAIN_INT_MM(a, b)


PLAIN_INT_MM = torch._int_mm


class TestAlignment:
    """The code path of a GPU, with the kernel of the CPU."""

    @pytest.fixture(autouse=True)
    def _strict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "_int_mm", strict_int_mm)

    @pytest.mark.parametrize(("t", "k", "n"), [(1, 7, 3), (16, 8, 8), (17, 100, 30), (96, 64, 48)])
    @pytest.mark.parametrize("column_major", [False, True])
    def test_the_product_is_exact(self, t: int, k: int, n: int, column_major: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        a, b = (
            torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
            for shape in ((t, k), (k, n))
        )
        b = b.T.contiguous().T if column_major else b
        assert torch.equal(aligned_int_product(a, b), a.int() @ b.int())

    def test_an_aligned_weight_is_not_copied_in_forward(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight = torch.ones(48, 64, dtype=torch.int8)
        seen: list[int] = []

        def note(a: Tensor, b: Tensor) -> Tensor:
            seen.append(b.data_ptr())
            return strict_int_mm(a, b)

        monkeypatch.setattr(torch, "_int_mm", note)
        aligned_int_product(torch.ones(32, 64, dtype=torch.int8), weight.T)
        assert seen == [weight.data_ptr()]

    @pytest.mark.parametrize("kind", ["int8", "int8x2", "int8_outliers"])
    def test_a_layer_of_unaligned_sizes(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(2)
        x = (torch.randn(5, 50, generator=generator) * 3).requires_grad_()
        dy = torch.randn(5, 30, generator=generator)
        layer = make_layer(kind, 50, 30)
        results = []
        for product in (aligned_int_product, PLAIN_INT_MM):
            monkeypatch.setattr(int8_matmul, "int_product", product)
            y = layer(x)
            results.append((y.detach(), torch.autograd.grad(y, x, dy)[0]))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ["int8", "int8x2"])
def test_few_rows_are_not_compiled_and_give_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a decode step equal those that were read in a large batch."""
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(3)).requires_grad_()
    dy, layer = torch.ones(9, 40), make_layer(kind, 96, 40)
    results, calls = [], []
    compiled = compilation.compiled
    monkeypatch.setattr(compilation, "compiled", lambda f: calls.append(f) or compiled(f))
    for most in (x.numel(), 0):
        monkeypatch.setattr(compilation, "MAX_SEPARATE", most)
        y = layer(x)
        results.append((y.detach(), torch.autograd.grad(y, x, dy)[0]))
        assert bool(calls) == (most == 0)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


class FakeGPU:
    """A device with the properties that ``torch.cuda`` reports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        self.device = torch.device("cuda")


class TestChoice:
    def test_auto_on_cpu(self) -> None:
        wide = "int8" if torch.cpu._is_vnni_supported() else "dequantize"
        assert resolve_matmul("auto", "int8", CPU, 4096) == wide
        assert resolve_matmul("auto", "int8", CPU, 128) == "dequantize"
        assert resolve_matmul("auto", "none", CPU, 4096) == "dequantize"

    @pytest.mark.parametrize("kind", ["int8", "int8x2", "int8_outliers", BITSANDBYTES])
    def test_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        gpu = FakeGPU(monkeypatch, (8, 0)).device
        assert resolve_matmul("auto", "int8", gpu, 128) == MEASURE
        assert resolve_matmul("auto", "none", gpu, 128) == "dequantize"
        assert resolve_matmul(kind, "int8", gpu, 128) == kind

    @pytest.mark.parametrize("kind", ["int8", "int8x2", "int8_outliers", BITSANDBYTES])
    def test_refusals(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        with pytest.raises(BadInput, match=rf"base\.matmul: {kind} needs int8 weights"):
            resolve_matmul(kind, "none", CPU, 4096)
        old = FakeGPU(monkeypatch, (7, 0)).device
        assert resolve_matmul("auto", "int8", old, 4096) == "dequantize"
        assert resolve_matmul("dequantize", "int8", old, 4096) == "dequantize"
        with pytest.raises(BadInput, match=rf"{kind} is not supported on Some GPU.*7\.0"):
            resolve_matmul(kind, "int8", old, 4096)
        with pytest.raises(BadInput, match=rf"{kind} is not supported on xpu"):
            resolve_matmul(kind, "int8", torch.device("xpu"), 4096)

    def test_layers_whose_sums_may_overflow_stay_exact(self) -> None:
        model = nn.ModuleDict(
            {
                "wide": FrozenLinear(MAX_INNER + 1, 8, bias=False, quantized=True),
                "tall": FrozenLinear(8, MAX_INNER + 1, bias=False, quantized=True),
                "unquantised": FrozenLinear(8, 8, bias=False, quantized=False),
                "small": FrozenLinear(24, 8, bias=False, quantized=True),
                "large": FrozenLinear(MAX_INNER, 8, bias=False, quantized=True),
            }
        )
        assert use_matmul(model, "int8", THRESHOLD) == ["wide", "tall"]
        exact = {
            name for name, layer in model.items() if layer.product is int8_matmul.frozen_matmul
        }
        assert exact == {"wide", "tall", "unquantised"}
        assert largest_shapes(model) == [(8, MAX_INNER), (8, 24)]


KIND_OF = {
    int8_matmul.frozen_matmul: "dequantize",
    int8_matmul.int8_matmul: "int8",
    bitsandbytes_matmul: "bitsandbytes",
}


class TestMeasure:
    """On CPU, with a fake clock or kernel."""

    SHAPES = ((48, 64),)

    def measured(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> Measured:
        def clock(_: Any, product: Any) -> float:
            function = getattr(product, "func", product)
            return seconds[KIND_OF[function]]

        monkeypatch.setattr(matmul_selection._Problem, "seconds", clock)
        return measure([*seconds], self.SHAPES, torch.float32, CPU, THRESHOLD)

    def test_the_fastest_is_selected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choice = self.measured(monkeypatch, {"dequantize": 0.002, "int8": 0.001})
        assert choice == Measured("int8", "int8 1.00 ms, dequantize 2.00 ms")
        choice = self.measured(monkeypatch, {"dequantize": 0.001, "int8": 0.002})
        assert choice.kind == "dequantize"

    def test_candidates_are_timed(self) -> None:
        choice = measure(["dequantize", "int8"], self.SHAPES, torch.float32, CPU, THRESHOLD)
        assert choice.kind in ("int8", "dequantize")
        assert "ms" in choice.reason

    def test_a_kernel_that_is_wrong_or_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(a: Tensor, b: Tensor) -> Tensor:
            return PLAIN_INT_MM(a, b) * 2

        def missing(a: Tensor, b: Tensor) -> Tensor:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

        monkeypatch.setattr(torch, "_int_mm", wrong)
        choice = self.measured(monkeypatch, {"dequantize": 0.002, "int8": 0.001})
        assert choice.kind == "dequantize"
        assert "off by" in choice.reason
        monkeypatch.setattr(torch, "_int_mm", missing)
        choice = self.measured(monkeypatch, {"dequantize": 0.002, "int8": 0.001})
        assert choice == Measured("dequantize", "int8 cannot run: CUBLAS_STATUS_NOT_SUPPORTED")

    def test_a_machine_on_which_triton_cannot_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the headers of Python, it raises an error that is not a RuntimeError."""

        def build(*_: Any) -> Tensor:
            raise subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"])

        monkeypatch.setattr(torch, "_int_mm", build)
        choice = self.measured(monkeypatch, {"dequantize": 0.002, "int8": 0.001})
        assert choice.kind == "dequantize"
        assert "int8 cannot run: Command '['gcc', 'cuda_utils.c']'" in choice.reason
        with pytest.raises(BadInput, match=r"base\.matmul: int8 cannot run: .*use auto or"):
            check_product("int8", self.SHAPES, torch.float32, CPU, THRESHOLD)

    @pytest.mark.parametrize("kind", ["int8", "int8x2", "int8_outliers"])
    def test_a_product_of_the_run_file_is_checked(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check_product(kind, self.SHAPES, torch.float32, CPU, THRESHOLD)
        check_product(kind, (), torch.float32, CPU, THRESHOLD)
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: PLAIN_INT_MM(a, b) * 2)
        with pytest.raises(BadInput, match=rf"base\.matmul: {kind} is off by .*; use auto or"):
            check_product(kind, self.SHAPES, torch.float32, CPU, THRESHOLD)

    @needs_library
    def test_bitsandbytes_is_a_candidate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds = {"dequantize": 0.003, "int8": 0.002, "bitsandbytes": 0.001}
        assert self.measured(monkeypatch, seconds) == Measured(
            "bitsandbytes", "bitsandbytes 1.00 ms, int8 2.00 ms, dequantize 3.00 ms"
        )
        seconds["int8"] = 0.0005
        assert self.measured(monkeypatch, seconds).kind == "int8"

    @needs_library
    def test_a_failing_matmul_is_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*_: Any) -> Tensor:
            raise RuntimeError("no kernel image is available")

        monkeypatch.setattr(bitsandbytes_module._functional(), "int8_linear_matmul", missing)
        seconds = {"dequantize": 0.003, "int8": 0.002, "bitsandbytes": 0.001}
        assert self.measured(monkeypatch, seconds) == Measured(
            "int8",
            "int8 2.00 ms, dequantize 3.00 ms; "
            "bitsandbytes cannot run: no kernel image is available",
        )


def test_bitsandbytes_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    bitsandbytes_module._functional.cache_clear()
    assert candidates() == ["dequantize", "int8"]
    with pytest.raises(
        BadInput,
        match=r"bitsandbytes cannot be imported .*promptshard\[bitsandbytes\].*, or use auto",
    ):
        resolve_matmul("bitsandbytes", "int8", CPU, 4096)


@needs_library
class TestBitsandbytes:
    @pytest.mark.parametrize(("kind", "outliers"), [("int8", 1.0), ("int8_outliers", 20.0)])
    def test_equals_ours_within_rounding(self, kind: str, outliers: float) -> None:
        """Their activations are rounded to float16 first; ours are not."""
        x, _ = activations(outliers)
        assert relative(make_layer("bitsandbytes")(x), make_layer(kind)(x)) < 2e-3

    def test_activations_beyond_float16_are_outliers(self) -> None:
        x = activations()[0].detach()
        x[0, 0, 3] = 1e5
        exact = make_layer("dequantize")(x)
        assert relative(make_layer("bitsandbytes")(x), exact) < 1e-4

    def test_no_tokens(self) -> None:
        assert make_layer("bitsandbytes")(torch.zeros(0, IN)).shape == (0, OUT)


def no_compiler() -> None:
    raise InvalidCxxCompiler


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        (f"{CPP_BUILDER}.get_cpp_compiler", no_compiler, r"a C\+\+ compiler"),
        ("sysconfig.get_path", lambda name: "/nowhere", "the headers of Python"),
        ("torch.utils.cpp_extension.TORCH_LIB_PATH", "/My files/torch/lib", "/My files/torch/lib"),
        (f"{CACHE}.cache_dir", lambda: "/tmp/my cache", "spaces .*TORCHINDUCTOR_CACHE_DIR"),
        ("os.access", lambda path, mode: False, "is not writable"),
        ("os.statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC), "is mounted noexec"),
    ],
)
def test_what_keeps_torch_from_compiling_is_reported_at_load(monkeypatch, target, value, reason):
    monkeypatch.setattr(target, value)
    assert resolve_matmul("auto", "int8", CPU, 4096) == "dequantize"
    with pytest.raises(BadInput, match=rf"on a CPU with.* {reason}.*\); use auto or dequantize"):
        resolve_matmul("int8", "int8", CPU, 4096)


@pytest.mark.parametrize("compiler", ["", "/gone/g", "ccache g"])
def test_a_compiler_of_the_environment_that_cannot_be_run_is_reported(monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    problem = rf"C\+\+ compiler \(CXX={compiler} cannot be run: unset it"
    with (
        torch._inductor.config.patch("cpp.cxx", (None, compiler)),  # read from CXX at import
        pytest.raises(BadInput, match=problem),
    ):
        resolve_matmul("int8", "int8", CPU, 4096)
