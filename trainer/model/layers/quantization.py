"""Row-wise absmax int8, in bitsandbytes' storage format.

A weight ``[N, K]`` is kept as ``int8`` rows and one fp32 ``absmax`` per row (bitsandbytes calls it
``SCB``): ``weight ≈ int8 * absmax / 127`` (LLM.int8(), arXiv 2208.07339, section 2.1).

Shape letters: N output features, K input features. Matrices may be stacked: [..., N, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127.0


def quantize_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows by their largest magnitude: int8 [..., N, K] and ``absmax``, fp32 [..., N]."""
    weight_NK = weight_NK.float()
    absmax_N = weight_NK.abs().amax(dim=-1)
    # Rows of zeros are divided by one: they remain zero instead of becoming NaN.
    divisor_N = torch.where(absmax_N == 0, torch.ones_like(absmax_N), absmax_N)
    quantized_NK = torch.round(weight_NK * (INT8_MAX / divisor_N)[..., None]).to(torch.int8)
    return quantized_NK, absmax_N


def dequantize_rows(quantized_NK: Tensor, absmax_N: Tensor) -> Tensor:
    """fp32 weight [..., N, K] of stored int8 rows."""
    return quantized_NK.float() * (absmax_N / INT8_MAX)[..., None]
