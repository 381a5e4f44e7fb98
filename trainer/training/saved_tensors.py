"""Counts the bytes that autograd saves from forward to backward."""

from __future__ import annotations

import torch
from torch import Tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context that counts the bytes of all tensors saved by a forward pass, each storage once.

    Tensors that a recomputed layer saves in backward are not counted.
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
