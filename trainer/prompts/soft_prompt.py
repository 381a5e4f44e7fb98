"""The two kinds of soft prompts: virtual tokens, and keys and values for every layer.

Shape letters: P virtual tokens, H hidden size, L layers, A key heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trainer.config.encoders import EncoderEntry
from trainer.packing.packed_row import PromptLengths


@dataclass(frozen=True, eq=False)
class SoftPrompt(ABC):
    """The output of a prompt encoder, which the base model reads before a row.

    Attributes:
        tensor: the values; the first dimension is P.
        in_packed_batch: the prompt occupies P positions of a packed batch. Otherwise it occupies
            none and enters each layer's attention as past keys and values.
        rms_dims: dimensions over which elements are of similar size.
    """

    tensor: Tensor

    in_packed_batch: ClassVar[bool]
    rms_dims: ClassVar[tuple[int, ...]]

    @property
    def num_virtual_tokens(self) -> int:
        return len(self.tensor)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a prompt with ``tensor.to(...)``."""
        return replace(self, tensor=self.tensor.to(*args, **kwargs))

    def leaf(self) -> Self:
        """Return a prompt with the same values that is a leaf of a new autograd graph."""
        return replace(self, tensor=self.tensor.detach().requires_grad_())

    def is_finite(self) -> bool:
        return bool(self.tensor.isfinite().all())

    @staticmethod
    @abstractmethod
    def to_matrices(tensor: Tensor) -> Tensor:
        """Return the matrices [..., P, columns] of a tensor of this kind, for Muon."""

    @staticmethod
    @abstractmethod
    def from_matrices(matrices: Tensor, shape: torch.Size) -> Tensor:
        """Invert ``to_matrices``; ``shape`` is that of the tensor."""


@dataclass(frozen=True, eq=False)
class VirtualTokens(SoftPrompt):
    """Virtual tokens: embeddings [P, H] before those of a row's tokens.

    Attributes:
        token_ids: P ids of a text whose embeddings these are, for models whose layers read token
            ids; None for other virtual tokens.
    """

    token_ids: tuple[int, ...] | None = None

    in_packed_batch = True
    rms_dims = (0, 1)

    @staticmethod
    def to_matrices(tensor: Tensor) -> Tensor:
        return tensor

    @staticmethod
    def from_matrices(matrices: Tensor, shape: torch.Size) -> Tensor:
        return matrices


@dataclass(frozen=True, eq=False)
class PrefixKeyValues(SoftPrompt):
    """Keys and values [P, L, 2, A, D] that every layer attends to.

    The matrices are [L, 2, P, A * D]: one for the keys and one for the values of each layer.
    """

    in_packed_batch = False
    rms_dims = (0, 3, 4)

    @staticmethod
    def to_matrices(tensor: Tensor) -> Tensor:
        return tensor.permute(1, 2, 0, 3, 4).flatten(3)

    @staticmethod
    def from_matrices(matrices: Tensor, shape: torch.Size) -> Tensor:
        return matrices.unflatten(3, shape[3:]).permute(2, 0, 1, 3, 4)


def kind_of(entry: EncoderEntry) -> type[SoftPrompt]:
    """Return the kind of prompt that an encoder produces."""
    return PrefixKeyValues if entry.trains_prefix else VirtualTokens


def prompt_lengths(prompts: Sequence[SoftPrompt]) -> PromptLengths:
    """Return how many positions each prompt occupies in a packed batch and in the past."""
    return PromptLengths(
        tuple(p.num_virtual_tokens if p.in_packed_batch else 0 for p in prompts),
        tuple(0 if p.in_packed_batch else p.num_virtual_tokens for p in prompts),
    )
