"""Where the rows of a parameter stand in the files of a checkpoint.

A parameter is always the rows of its tensors, end to end: of one, or of one or two for each expert
of a stack. Which tensors these are: ``trainer.model.weight_mapping``.

Shape letters: E experts, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class HeaderReader(Protocol):
    """What looks tensors up in the headers of their files."""

    def problem(self, name: str, shape: torch.Size) -> str | None: ...


class FlatReader(Protocol):
    """What reads elements ``start`` to ``stop`` of a tensor as if it had one dimension."""

    def read_flat(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class TensorLocation:
    """Where the values of one parameter stand.

    Attributes:
        tensors: names in the checkpoint; their rows, end to end, are the parameter's.
        shape: of the parameter: [N, K], [E, N, K], or a vector.
        transposed: each matrix is stored as [K, N].
    """

    tensors: tuple[str, ...]
    shape: torch.Size
    transposed: bool = False

    @property
    def stored_shape(self) -> torch.Size:
        """Of each tensor in the checkpoint."""
        shape = tuple(self.shape)
        if len(self.tensors) > 1:
            shape = (self.shape[:-1].numel() // len(self.tensors), shape[-1])
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return torch.Size(shape)

    def problems(self, reader: HeaderReader) -> list[str]:
        """What is wrong with the tensors, from the headers of their files."""
        found = (reader.problem(name, self.stored_shape) for name in self.tensors)
        return [problem for problem in found if problem]


class RowReader:
    """Reads rows of one parameter without reading the whole of it.

    Where matrices are stored transposed, a row is a column of the file: there the whole matrix (of
    one expert) is read, and kept until rows of another are asked for.
    """

    def __init__(self, source: TensorLocation, reader: FlatReader) -> None:
        self.source, self.reader = source, reader
        self._matrix: tuple[int, Tensor] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of [..., N, K] as one tall matrix, or elements of a vector."""
        shape = self.source.shape
        if len(shape) == 1:
            return self.reader.read_flat(self.source.tensors[0], start, stop)
        if self.source.transposed:
            return self._unit_rows(start, stop, shape[-2], self._transposed)
        per_tensor = shape[:-1].numel() // len(self.source.tensors)
        return self._unit_rows(start, stop, per_tensor, self._straight)

    def _unit_rows(
        self, start: int, stop: int, unit: int, read: Callable[[int, int, int], Tensor]
    ) -> Tensor:
        """Rows from as many units of ``unit`` rows as they touch."""
        parts = []
        for i in range(start // unit, -(-stop // unit)):
            parts.append(read(i, max(start - i * unit, 0), min(stop - i * unit, unit)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _straight(self, tensor: int, start: int, stop: int) -> Tensor:
        k = self.source.shape[-1]
        flat = self.reader.read_flat(self.source.tensors[tensor], start * k, stop * k)
        return flat.view(-1, k)

    def _transposed(self, matrix: int, start: int, stop: int) -> Tensor:
        if self._matrix is None or self._matrix[0] != matrix:
            n, k = self.source.shape[-2:]
            (name,) = self.source.tensors
            flat = self.reader.read_flat(name, matrix * n * k, (matrix + 1) * n * k)
            self._matrix = matrix, flat.view(k, n)
        return self._matrix[1][:, start:stop].T.contiguous()


def locate_parameters(
    model: PreTrainedModel, tensors: Mapping[str, tuple[str, ...]]
) -> dict[str, TensorLocation]:
    """The source of every parameter, by each of its names; tied weights share one.

    Args:
        tensors: of each parameter, see ``WeightMapping``.
    """
    return {
        name: TensorLocation(tensors[name], parameter.shape, _transposed(model, name))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _transposed(model: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own in getattr(model.get_submodule(path), "transposed", ())
