"""Which tensors of a checkpoint make up a parameter.

Checkpoints of one family differ: some leave out the model's prefix, a multimodal one puts its text
model under ``language_model``, a mixture of experts comes with one tensor per expert or with all of
them stacked. A parameter is always the rows of its tensors, end to end.

Shape letters: E experts, N output features, K input features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.base.families import Family

PER_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")


class HeaderReader(Protocol):
    """What looks tensors up in the headers of their files."""

    def problem(self, name: str, shape: torch.Size) -> str | None: ...


class FlatReader(Protocol):
    """What reads elements ``start`` to ``stop`` of a tensor as if it had one dimension."""

    def read_flat(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Source:
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

    def __init__(self, source: Source, reader: FlatReader) -> None:
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


def find_sources(
    model: PreTrainedModel, tensors: Iterable[str], family: Family
) -> dict[str, Source]:
    """The source of every parameter, by each of its names; tied weights share one.

    A parameter that the checkpoint lacks gets its own name as source, for the reader to miss.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored, experts = _stored_names(tensors, family, model.base_model_prefix)
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    sources = {}
    for name, parameter in parameters.items():
        aliases = [name, *names[id(parameter)]]
        found = next((stored[alias] for alias in aliases if alias in stored), None)
        rows = (found,) if found else experts.get(name, (names[id(parameter)][0],))
        sources[name] = Source(rows, parameter.shape, _transposed(model, name))
    return sources


def _transposed(model: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own in getattr(model.get_submodule(path), "transposed", ())


def _stored_names(
    tensors: Iterable[str], family: Family, prefix: str
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """The checkpoint's tensors by our names, and the tensors of single experts by their stack's."""
    stored: dict[str, str] = {}
    single: dict[str, dict[tuple[int, int], str]] = {}
    for tensor in tensors:
        name = tensor.replace("language_model.", "")
        for old, new in family.renamed:
            name = name.replace(old, new)
        expert = PER_EXPERT.match(name)
        if expert and expert[3] in family.experts:
            part = family.experts.index(expert[3])
            stack = f"{expert[1]}.{'down_proj' if part == 2 else 'gate_up_proj'}"
            for known in (stack, f"{prefix}.{stack}"):
                single.setdefault(known, {})[int(expert[2]), part] = tensor
        # A checkpoint of the model without its head leaves out the prefix.
        stored.setdefault(f"{prefix}.{name}", tensor)
        stored[name] = tensor
    return stored, {name: tuple(t for _, t in sorted(s.items())) for name, s in single.items()}
