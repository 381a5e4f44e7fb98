"""Counts what autograd keeps between forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Inside, the bytes of all saved tensors are counted, each piece of memory once.

    Stands around a forward. What a recomputed layer saves in backward is not seen, and weights that
    a frozen layer reads again are not saved.
    """

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}
        super().__init__(self._count, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self._bytes.values())

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._bytes[storage.data_ptr()] = storage.nbytes()
        return tensor
