"""Which product the frozen linear layers use: the run file's, or the one that is faster here.

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

from trainer.model.layers.int8_matmul import MAX_INNER, Matrix, Product, frozen_matmul, int8_matmul
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.quantization import INT8_MAX
from trainer.runtime.errors import BadInput

#: ``auto`` where measuring must decide.
MEASURE = "auto"
#: On CPU: below this hidden size an integer product saves less than quantising its operands costs.
INT8_MATMUL_MIN_HIDDEN = 512
#: Compute capability of the first GPUs whose matrix units multiply int8 (Turing).
INT8_CAPABILITY = (7, 5)
#: Relative error of an int8 product of Gaussian matrices is about 0.01; beyond this it is broken.
ACCEPTABLE_ERROR = 0.03
MEASURED_TOKENS = 2048
MEASURED_ROUNDS = 5
#: At most so many of the model's shapes, the largest ones.
MEASURED_SHAPES = 2


def resolve_matmul(setting: str, quantization: str, device: torch.device, hidden_size: int) -> str:
    """``base.matmul`` with ``auto`` resolved as far as it can be without measuring.

    Returns:
        dequantize, int8 or int8_outliers; ``MEASURE`` where ``measure`` is to decide.

    Raises:
        BadInput: if int8 is asked for where there are no int8 weights, or on a device that does
            not multiply them.
    """
    if setting == "dequantize":
        return setting
    missing = _why_no_int8(device)
    if setting == "auto":
        if quantization != "int8" or missing:
            return "dequantize"
        if device.type != "cpu":
            return MEASURE
        # Measured on CPU too, but compiling what surrounds a product takes longer there than the
        # answer is worth: it follows from the width.
        fast = torch.cpu._is_vnni_supported() and hidden_size >= INT8_MATMUL_MIN_HIDDEN
        return "int8" if fast else "dequantize"
    if quantization != "int8":
        raise BadInput(
            f"base.matmul: {setting} needs int8 weights, but base.quantization is {quantization}; "
            "use base.quantization=int8 or base.matmul=dequantize"
        )
    if missing:
        raise BadInput(
            f"base.matmul: {setting} is not supported on {missing}; use auto or dequantize"
        )
    return setting


def _why_no_int8(device: torch.device) -> str | None:
    """The device, if it does not multiply int8 matrices, or what it lacks."""
    if device.type == "cpu":
        # What surrounds the products is compiled at the first step, minutes after the load began.
        return None if _has_compiler() else "a CPU without a C++ compiler (install g++)"
    if device.type != "cuda":
        return device.type
    capability = torch.cuda.get_device_capability(device)
    if capability >= INT8_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name}, of compute capability {capability[0]}.{capability[1]}"


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def use_matmul(model: nn.Module, kind: str, outlier_threshold: float) -> list[str]:
    """Let every quantised linear layer multiply in this way; stacked experts stay exact.

    Args:
        kind: dequantize, int8 or int8_outliers.

    Returns:
        Names of the layers that stay exact because sums over their width may leave int32.
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
    return too_wide


def _product(kind: str, outlier_threshold: float) -> Product:
    if kind == "dequantize":
        return frozen_matmul
    return partial(int8_matmul, threshold=outlier_threshold if kind == "int8_outliers" else None)


def largest_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(N, K) of the model's quantised linear layers, the largest few."""
    shapes = {
        (layer.out_features, layer.in_features)
        for layer in model.modules()
        if isinstance(layer, FrozenLinear) and layer.absmax is not None
    }
    fitting = [shape for shape in shapes if max(shape) <= MAX_INNER]
    return sorted(fitting, key=lambda shape: (-math.prod(shape), shape))[:MEASURED_SHAPES]


@dataclass(frozen=True)
class Measured:
    """What ``auto`` found, and the words for the log."""

    kind: str
    reason: str


def measure(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Measured:
    """Take the faster of ``int8`` and ``dequantize`` on random matrices of these shapes.

    Forward and input-gradient, quantisation included, in turns; medians. A device whose int8
    product fails, or is further off than rounding explains, gets ``dequantize``.
    """
    exact, rounded = _product("dequantize", 0.0), _product("int8", 0.0)
    seconds = [0.0, 0.0]
    try:
        for shape in shapes:
            problem = _Problem(shape, dtype, device)
            error = problem.error(rounded, exact)
            if not error <= ACCEPTABLE_ERROR:
                return Measured("dequantize", f"int8 is off by {error:.1%} at {shape}")
            rounds = [
                (problem.seconds(exact), problem.seconds(rounded)) for _ in range(MEASURED_ROUNDS)
            ]
            for i, times in enumerate(zip(*rounds, strict=True)):
                seconds[i] += statistics.median(times)
    except RuntimeError as error:  # of the kernel, of the compiler, or no memory for a trial
        return Measured("dequantize", f"int8 cannot run: {str(error).strip().splitlines()[0]}")
    finally:
        if device.type == "cuda":  # what is free is asked for next
            torch.cuda.empty_cache()
    kind = "int8" if seconds[1] < seconds[0] else "dequantize"
    milliseconds = [1e3 * s for s in seconds]
    return Measured(kind, "int8 {1:.2f} ms, dequantize {0:.2f} ms".format(*milliseconds))


class _Problem:
    """One matrix, input and output gradient to try products on."""

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

    def error(self, found: Product, expected: Product) -> float:
        """The larger relative error of the two directions; also warms both products up."""
        pairs = zip(self.run(found), self.run(expected), strict=True)
        return max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)

    def seconds(self, product: Product) -> float:
        self._synchronize()
        started = time.perf_counter()
        self.run(product)
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
