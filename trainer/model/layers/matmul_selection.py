"""Selection of the matrix product of frozen linear layers: as configured, or the fastest.

Shape letters: T tokens, K input features, N output features.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.layers.bitsandbytes_matmul import bitsandbytes_matmul, missing_library
from trainer.model.layers.compilation import why_not_on_cpu
from trainer.model.layers.fused_ops import fuse_int8_layers
from trainer.model.layers.int8_matmul import (
    MAX_INNER,
    Matrix,
    Product,
    Terms,
    frozen_matmul,
    int8_matmul,
    one_term,
    one_term_for_gradients,
    two_terms,
)
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.quantization import INT8_MAX
from trainer.packing.activation_memory import INT8_MATMUL_MIN_HIDDEN
from trainer.runtime.errors import BadInput

#: Terms of the activations in each kind of int8 product.
INT8_TERMS: dict[str, Terms] = {
    "int8": one_term_for_gradients,
    "int8x2": two_terms,
    "int8_outliers": one_term,
}
#: Result of ``resolve_matmul`` if ``measure`` selects the product.
MEASURE = "auto"
#: Compute capability of the first GPUs whose matrix units multiply int8 (Turing).
INT8_CAPABILITY = (7, 5)
#: Maximum relative error of a usable product; int8 with Gaussian matrices has about 0.01.
ACCEPTABLE_ERROR = 0.03
MEASURED_TOKENS = 2048
MEASURED_ROUNDS = 5
#: Number of the model's largest shapes that are timed.
MEASURED_SHAPES = 2
#: Outlier features of the timed activations, as in models of 6.7B parameters (LLM.int8(), arXiv
#: 2208.07339, section 4), and their factor. Outliers affect the time of bitsandbytes only.
OUTLIER_FEATURES, OUTLIER_FACTOR = 6, 60.0


def resolve_matmul(setting: str, quantization: str, device: torch.device, hidden_size: int) -> str:
    """Resolve ``base.matmul: auto`` as far as possible without measuring.

    Returns:
        any other value of the setting, or ``MEASURE`` if ``measure`` must be called.

    Raises:
        BadInput: if an int8 product is requested, but the weights are not int8, the device does
            not multiply int8 matrices, or bitsandbytes cannot be imported.
    """
    if setting == "dequantize":
        return setting
    unsupported = unsupported_device(device)
    if setting == "auto":
        if quantization != "int8" or unsupported:
            return "dequantize"
        if device.type != "cpu":
            return MEASURE
        # Not measured on CPU, where compiling the quantization takes longer than timing can save.
        fast = torch.cpu._is_vnni_supported() and hidden_size >= INT8_MATMUL_MIN_HIDDEN
        return "int8" if fast else "dequantize"
    if quantization != "int8":
        raise BadInput(
            f"base.matmul: {setting} needs int8 weights, but base.quantization is {quantization}; "
            "use base.quantization=int8 or base.matmul=dequantize"
        )
    if unsupported:
        raise BadInput(
            f"base.matmul: {setting} is not supported on {unsupported}; use auto or dequantize"
        )
    if setting == "bitsandbytes" and (reason := missing_library()):
        raise BadInput(
            f"base.matmul: bitsandbytes cannot be imported ({reason}); run `pip install "
            "'promptshard[bitsandbytes]'`, or use auto, int8 or dequantize"
        )
    return setting


def unsupported_device(device: torch.device) -> str | None:
    """Description of a device that does not multiply int8 matrices; None if it does."""
    if device.type == "cpu":
        # Checked at load, because the first compilation happens only at the first step.
        return f"a CPU {reason}" if (reason := why_not_on_cpu()) else None
    if device.type != "cuda":
        return device.type
    capability = torch.cuda.get_device_capability(device)
    if capability >= INT8_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name}, of compute capability {capability[0]}.{capability[1]}"


def use_matmul(model: nn.Module, kind: str, outlier_threshold: float) -> list[str]:
    """Set the product of every quantized linear layer; stacked experts remain exact.

    Returns:
        Names of the layers that remain exact because sums over their width may exceed int32.
    """
    if kind == "dequantize":
        return []
    product = _product(kind, outlier_threshold)
    too_wide = []
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear) and layer.absmax is not None:
            if max(layer.in_features, layer.out_features) > MAX_INNER:
                too_wide.append(name)
            else:
                layer.product = product
    if kind in ("int8", "int8x2"):
        fuse_int8_layers(model, product, INT8_TERMS[kind])
    return too_wide


def _product(kind: str, outlier_threshold: float) -> Product:
    if kind == "dequantize":
        return frozen_matmul
    if kind == "bitsandbytes":
        return partial(bitsandbytes_matmul, threshold=outlier_threshold)
    threshold = outlier_threshold if kind == "int8_outliers" else None
    return partial(int8_matmul, threshold=threshold, terms=INT8_TERMS[kind])


def largest_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(N, K) of the largest quantized linear layers, at most ``MEASURED_SHAPES``."""
    shapes = {
        (layer.out_features, layer.in_features)
        for layer in model.modules()
        if isinstance(layer, FrozenLinear) and layer.absmax is not None
    }
    fitting = [shape for shape in shapes if max(shape) <= MAX_INNER]
    return sorted(fitting, key=lambda shape: (-math.prod(shape), shape))[:MEASURED_SHAPES]


@dataclass(frozen=True)
class Measured:
    """Result of timing the products: the fastest, and times and failures for the log."""

    kind: str
    reason: str


def candidates() -> list[str]:
    """Kinds that ``measure`` can time in this process."""
    return ["dequantize", "int8", *([] if missing_library() else ["bitsandbytes"])]


def measure(
    kinds: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    outlier_threshold: float,
) -> Measured:
    """Time the products on random matrices of these shapes and select the fastest.

    A run is a forward pass with its input-gradient, including quantization. The products take
    turns, and the median times of the shapes are summed. A product that fails or whose error
    exceeds ``ACCEPTABLE_ERROR`` is excluded.

    Args:
        kinds: a subset of ``candidates`` that starts with dequantize.
    """
    kinds = list(kinds)
    products = {kind: _product(kind, outlier_threshold) for kind in kinds}
    seconds, failures = dict.fromkeys(kinds, 0.0), []
    try:
        for shape in shapes:
            problem = _Problem(shape, dtype, device)
            for kind in kinds[1:]:
                if failure := problem.failure(products[kind], products["dequantize"]):
                    failures.append(f"{kind} {failure}")
                    kinds.remove(kind)
            if len(kinds) == 1:
                break
            problem.add_outliers()
            rounds = [[problem.seconds(products[k]) for k in kinds] for _ in range(MEASURED_ROUNDS)]
            for kind, times in zip(kinds, zip(*rounds, strict=True), strict=True):
                seconds[kind] += statistics.median(times)
    except RuntimeError as error:  # most likely out of memory
        return Measured("dequantize", f"timing failed: {_first_line(error)}")
    finally:
        if device.type == "cuda":  # free memory is measured next
            torch.cuda.empty_cache()
    if len(kinds) > 1:
        failures.insert(0, ", ".join(f"{k} {1e3 * seconds[k]:.2f} ms" for k in reversed(kinds)))
    return Measured(min(kinds, key=lambda kind: seconds[kind]), "; ".join(failures))


def check_product(
    kind: str,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    outlier_threshold: float,
) -> None:
    """Run the product that ``base.matmul`` names once, on a random matrix of the first shape.

    Without this check, a machine without a compiler for Triton would fail at the first step.

    Raises:
        BadInput: if the product fails, or its error exceeds ``ACCEPTABLE_ERROR``.
    """
    products = [_product(each, outlier_threshold) for each in (kind, "dequantize")]
    failures = [_Problem(shape, dtype, device).failure(*products) for shape in shapes[:1]]
    if device.type == "cuda":  # free memory is measured next
        torch.cuda.empty_cache()
    if any(failures):
        raise BadInput(f"base.matmul: {kind} {failures[0]}; use auto or dequantize")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Problem:
    """Random weight, input and output gradient to run products with."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        n, k = shape
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "generator": generator}
        self.device = device
        self.weight_NK = torch.randint(-127, 128, shape, dtype=torch.int8, **options)
        self.scale_N = torch.full((n,), 1 / (INT8_MAX * math.sqrt(k)), device=device)
        self.x_TK = torch.randn(MEASURED_TOKENS, k, dtype=dtype, **options).requires_grad_()
        self.dy_TN = torch.randn(MEASURED_TOKENS, n, dtype=dtype, **options)

    def run(self, product: Product) -> tuple[Tensor, Tensor]:
        matrix: Matrix = lambda: (self.weight_NK, self.scale_N)  # noqa: E731
        y_TN = product(self.x_TK, matrix)
        (dx_TK,) = torch.autograd.grad(y_TN, self.x_TK, self.dy_TN)
        return y_TN.detach(), dx_TK

    def failure(self, product: Product, exact: Product) -> str | None:
        """Reason why the product is unusable, or None. The comparison warms both products up."""
        try:
            actual = self.run(product)
        # From the kernel, the allocator, or the compiler: without the headers of Python, Triton
        # raises CalledProcessError; without CUDA's driver library, AssertionError.
        except Exception as error:
            return f"cannot run: {_first_line(error)}"
        pairs = zip(actual, self.run(exact), strict=True)
        largest = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
        if largest <= ACCEPTABLE_ERROR:  # false for NaN
            return None
        return f"is off by {largest:.1%} at {tuple(self.weight_NK.shape)}"

    def add_outliers(self) -> None:
        with torch.no_grad():
            self.x_TK[:, :OUTLIER_FEATURES] *= OUTLIER_FACTOR

    def seconds(self, product: Product) -> float:
        self._synchronize()
        started = time.perf_counter()
        self.run(product)
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
