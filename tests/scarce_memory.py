"""An allocator that fails on demand, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.model.layers.linear import FrozenLinear


@contextmanager
def scarce(base: torch.nn.Module, limit: int, backward: bool) -> Iterator[None]:
    """Let a layer in the middle fail to allocate for more than ``limit`` tokens."""
    layers = [m for m in base.modules() if isinstance(m, FrozenLinear)]
    layer = layers[len(layers) // 2]

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return tensor

    def hook(_: Any, inputs: Any, output: torch.Tensor) -> None:
        if not backward:
            fail(output)
        elif output.requires_grad:
            output.register_hook(fail)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
