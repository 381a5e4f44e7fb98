"""Locate the stored tensors of each parameter, and read a parameter by rows.

A parameter consists of the concatenated rows of one tensor, or of one or two tensors per expert.
``trainer.model.weight_mapping`` finds these tensors.

Shape letters: E experts, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.model.safetensors_reader import SafetensorsReader, StoredTensor
from trainer.model.weight_mapping import WeightMapping

#: Bytes in fp32 that are read at a time; loading needs this memory besides the shards.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorLocation:
    """The stored tensors of one parameter.

    Attributes:
        tensors: names of the tensors whose concatenated rows form the parameter.
        shape: of the parameter: [N, K], [E, N, K], or a vector.
        transposed: each matrix is stored as [K, N].
    """

    tensors: tuple[str, ...]
    shape: torch.Size
    transposed: bool = False

    @property
    def stored_shape(self) -> torch.Size:
        """The shape of each stored tensor."""
        shape = tuple(self.shape)
        if len(self.tensors) > 1:
            shape = (self.shape[:-1].numel() // len(self.tensors), shape[-1])
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return torch.Size(shape)

    def as_int8(self) -> TensorLocation:
        """The location if the tensors are int8, which are never stored transposed."""
        return replace(self, transposed=False)

    def problems(self, reader: SafetensorsReader) -> list[str]:
        """Problems of the tensors, from the headers of their files."""
        problems = (reader.problem(name, self.stored_shape) for name in self.tensors)
        return [problem for problem in problems if problem]


class RowReader:
    """Reads some rows of one parameter.

    Rows of a transposed matrix are columns in the file: the complete matrix (of one expert) is read
    and cached until rows of another matrix are read.
    """

    def __init__(self, location: TensorLocation, reader: SafetensorsReader) -> None:
        self._location, self._reader = location, reader
        self._matrix: tuple[int, Tensor] | None = None

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Read rows ``start`` to ``stop``, by default all, in blocks of BLOCK_BYTES in fp32."""
        shape = self._location.shape
        if stop is None:
            stop = shape[:-1].numel()
        size = max(1, BLOCK_BYTES // (4 * (shape[-1] if len(shape) > 1 else 1)))
        for first in range(start, stop, size):
            last = min(first + size, stop)
            yield slice(first, last), self.read(first, last)

    def can_fill(self, shard: Tensor) -> bool:
        """Whether the files hold the parameter's elements in this shard's type and order."""
        return (
            shard.is_cpu
            and not self._location.transposed
            and all(
                self._reader.tensors[name].encoding is None
                and self._reader.dtype(name) == shard.dtype
                for name in self._location.tensors
            )
        )

    def fill(self, shard: Tensor, start: int) -> None:
        """Read the parameter's elements from ``start`` on into a shard, without a copy."""
        size, stop = self._location.stored_shape.numel(), start + len(shard)
        for i, name in enumerate(self._location.tensors):
            begin, end = max(start, i * size), min(stop, (i + 1) * size)
            if begin < end:
                mine = shard[begin - start : end - start]
                self._reader.read_into(name, begin - i * size, mine, BLOCK_BYTES // 4)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of [..., N, K] as one matrix, or elements of a vector."""
        shape, tensors = self._location.shape, self._location.tensors
        if len(shape) == 1:
            return self._reader.read_flat(tensors[0], start, stop)
        # Rows of one stored tensor, or of one matrix of a transposed tensor.
        unit = shape[-2] if self._location.transposed else shape[:-1].numel() // len(tensors)
        parts = [
            self._read_unit(i, max(start - i * unit, 0), min(stop - i * unit, unit))
            for i in range(start // unit, -(-stop // unit))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_unit(self, unit: int, start: int, stop: int) -> Tensor:
        n, k = self._location.shape[-2:]
        if not self._location.transposed:
            name = self._location.tensors[unit]
            return self._reader.read_flat(name, start * k, stop * k).view(-1, k)
        if self._matrix is None or self._matrix[0] != unit:
            (name,) = self._location.tensors
            flat = self._reader.read_flat(name, unit * n * k, (unit + 1) * n * k)
            self._matrix = unit, flat.view(k, n)
        return self._matrix[1][:, start:stop].T.contiguous()


def locate_parameters(
    model: PreTrainedModel,
    mapping: WeightMapping,
    stored: Mapping[str, StoredTensor],
) -> dict[str, TensorLocation]:
    """Return the location of every parameter and persistent buffer.

    A tied parameter is listed under all its names.
    """

    def is_transposed(name: str) -> bool:
        path, _, own = name.rpartition(".")
        transposed = getattr(model.get_submodule(path), "transposed", None)
        turned = isinstance(transposed, frozenset) and own in transposed
        turned = turned != (name in mapping.transposed)
        return turned and not stored[mapping.tensors[name][0]].by_rows

    tensors = mapping.tensors
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in tensors}
    return {
        name: TensorLocation(tensors[name], tensor.shape, is_transposed(name))
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers.items())
    }
