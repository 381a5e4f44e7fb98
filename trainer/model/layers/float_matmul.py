"""Products of frozen matrices in floating point.

torch multiplies fp32 matrices on x86 CPUs with MKL, which uses AVX2 on processors of AMD even if
they have AVX-512. oneDNN, which is also a part of torch, is twice as fast there. It needs memory
for every combination of sizes (megabytes, never freed), so only large matrices are multiplied with
it, a fixed number of rows at a time.

Shape letters: T tokens, K input features, N output features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainer.packing.activation_memory import ONEDNN_MIN_ELEMENTS
from trainer.runtime.process import read_text

#: ``vendor_id`` of processors on which MKL leaves AVX-512 unused.
SLOW_WITH_MKL = ("AuthenticAMD", "HygonGenuine")
CPU_INFO = "/proc/cpuinfo"
#: Numbers of rows that oneDNN multiplies at a time; others are padded.
ROWS = (256, 128, 64, 32)
FEW_ROWS = (1, 8)


def times_transposed(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ W.T``."""
    fp32 = x_TK.is_cpu and x_TK.dtype == weight_NK.dtype == torch.float32
    if not (fp32 and weight_NK.numel() >= ONEDNN_MIN_ELEMENTS and prefers_onednn()):
        return x_TK @ weight_NK.T
    y_TN = x_TK.new_empty(len(x_TK), len(weight_NK))
    for start, stop, num_rows in _blocks(len(x_TK)):
        rows = padded(x_TK[start:stop], num_rows, x_TK.shape[1])
        product = torch.ops.mkldnn._linear_pointwise(rows, weight_NK, None, "none", [], "")
        y_TN[start:stop] = product[: stop - start]
    return y_TN


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with rows and columns of zeros up to this size; not copied if it has the size."""
    missing = columns - matrix.shape[1], rows - matrix.shape[0]
    return pad(matrix, (0, missing[0], 0, missing[1])) if any(missing) else matrix


def _blocks(num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield where each block of rows starts and stops, and its number of rows when padded."""
    start = 0
    while start < num_rows:
        left = num_rows - start
        few = [size for size in FEW_ROWS if left <= size]
        size = few[0] if few else next(s for s in ROWS if s <= max(left, ROWS[-1]))
        yield start, min(start + size, num_rows), size
        start += size


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL on this CPU.

    Decided by its name and not by a measurement, so that a resumed run rounds as before.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", read_text(CPU_INFO), flags=re.MULTILINE)
    return vendor is not None and vendor[1] in SLOW_WITH_MKL
