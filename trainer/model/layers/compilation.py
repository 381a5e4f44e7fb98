"""Compile functions of tensors into one loop over memory, where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Up to this number of elements, a call of the compiled loop takes longer than separate operations
#: (measured on a CPU: 25 us for the call alone), as for the few rows of a decode step.
MAX_SEPARATE = 1 << 16


def fused_loop(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return ``function``, compiled if ``x``, its largest input, has many elements."""
    return function if x.numel() <= MAX_SEPARATE else compiled(function)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on its first use, once for all shapes.

    Without fusion, quantizing the operands takes as long as the integer product itself.
    """
    return torch.compile(function, dynamic=True)
