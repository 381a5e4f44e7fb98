"""Load a checkpoint directly into shards.

Every rank reads only the rows of a tensor that its shard contains, and quantizes them. Rows are
quantized independently, so the result equals that of quantizing the full tensor. No rank holds a
full tensor, except one transposed matrix at a time. Ranks exchange no weights, only the row scales,
in one all-reduce.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.checkpoint_files import BaseFiles
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.layers.linear import FrozenLinear, absmax_name
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.moe import FrozenExperts
from trainer.model.layers.quantization import quantize_rows
from trainer.model.layers.row_exchange import RowExchange
from trainer.model.prompted_model import PromptedBase
from trainer.model.safetensors_reader import Progress, SafetensorsReader
from trainer.model.tensor_locations import RowReader, TensorLocation, locate_parameters
from trainer.runtime.errors import BadInput
from trainer.runtime.freed_memory import return_freed_memory


class WeightSharder(Protocol):
    """Divides parameters among the ranks.

    Attributes:
        exchange: exchanges rows of embedding and head; None if this rank holds all rows.
    """

    exchange: RowExchange | None

    def bounds(self, num_elements: int, unit: int = 1) -> tuple[int, int]:
        """Start and stop of this rank's shard of a flat tensor; ``unit`` elements stay together."""

    def allocate(self, num_elements: int, dtype: torch.dtype, unit: int = 1) -> Tensor:
        """Allocate this rank's shard of a flat tensor. Only its padding is set, to zeros."""

    def adopt(self, parameter: nn.Parameter, shard: Tensor) -> None:
        """Turn a parameter on ``meta`` into a sharded parameter with this shard."""

    def finish(self, scales: Sequence[Tensor], problems: Sequence[str]) -> None:
        """Raise any rank's problems on all ranks; fill in row scales that other ranks have read."""


@dataclass(frozen=True)
class LoadStats:
    """Seconds of loading, and bytes that this rank read from disk."""

    seconds: float
    bytes_read: int


def load_shards(
    model: PreTrainedModel,
    files: BaseFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sharder: WeightSharder,
    checkpointing: bool,
    progress: Progress = lambda _: None,
) -> tuple[PromptedBase, LoadStats]:
    """Load the weights of a model on ``meta``, parameter by parameter.

    Raises:
        BadInput: on all ranks, with the tensors that any rank cannot read or that hold NaN.
    """
    started = time.perf_counter()
    locations = locate_parameters(model, files.parameters, files.tensors)
    with (
        return_freed_memory(reuse=not checkpointing),
        SafetensorsReader(files.tensors, progress) as reader,
    ):
        loader = _WeightLoader(reader, sharder, dtype, device)
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                location = locations[f"{path}.{name}" if path else name]
                loader.load(module, name, parameter, location)
            for name, _ in list(module.named_buffers(recurse=False)):
                if buffer := locations.get(f"{path}.{name}"):
                    loader.load_buffer(module, name, buffer)
        sharder.finish(loader.partial_scales, loader.problems)
        stats = LoadStats(time.perf_counter() - started, reader.bytes_read)
    model.requires_grad_(False)
    model.eval()
    if checkpointing:
        _enable_checkpointing(model)
    return PromptedBase(model, dtype), stats


@dataclass
class _WeightLoader:
    """Loads parameters one by one; collects row scales and problems for ``finish``."""

    reader: SafetensorsReader
    sharder: WeightSharder
    dtype: torch.dtype
    device: torch.device
    partial_scales: list[Tensor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    # Of loaded parameters, by id: tied parameters occur twice.
    _scales: dict[int, Tensor | None] = field(default_factory=dict)
    _rows: dict[int, Tensor] = field(default_factory=dict)

    def load(
        self, module: nn.Module, name: str, parameter: nn.Parameter, location: TensorLocation
    ) -> None:
        """Load this rank's shard of a parameter; collect problems, as others wait in ``finish``."""
        key = id(parameter)
        holder = module if isinstance(module, FrozenEmbedding | FrozenHead) else None
        table = holder if name == "weight" else None
        if key not in self._scales:
            scales = None
            try:
                unit = parameter.shape[1] if table else 1  # shards of tables consist of full rows
                if parameter.dtype == torch.int8:
                    shard, scales = self._load_int8(location, unit)
                else:
                    shard = self._load_float(module, location, unit)
                if table:
                    # Detached: the view would keep a reference to its base.
                    self._rows[key] = shard.view(-1, unit).detach()
                else:
                    self.sharder.adopt(parameter, shard)
            except BadInput as error:
                self.problems += error.problems
            self._scales[key] = scales
        if table and key in self._rows:
            table.hold(self._rows[key], self.sharder.exchange)
        scales = self._scales[key]
        if scales is not None:
            setattr(module, absmax_name(name), scales)

    def load_buffer(self, module: nn.Module, name: str, location: TensorLocation) -> None:
        """Load a persistent buffer, such as a router's correction bias, completely and in fp32."""
        try:
            values = self.reader.read(location.tensors[0])
            module._buffers[name] = values.float().to(self.device)
        except BadInput as error:
            self.problems += error.problems

    def _load_int8(self, location: TensorLocation, unit: int) -> tuple[Tensor, Tensor]:
        """This rank's shard, quantized now or stored as int8, and the scales of all rows."""
        shard = self.sharder.allocate(location.shape.numel(), torch.int8, unit)
        if self.reader.is_int8(location.tensors[0]):
            scales = self.reader.read_row_scales(location.tensors).to(self.device)
            self._copy(location, unit, shard)
        else:
            scales = torch.zeros(location.shape[:-1].numel(), device=self.device)
            for rows, values, mine, target in self._blocks(location, unit):
                quantized, scales[rows] = quantize_rows(values.to(self.device))
                shard[target] = quantized.flatten()[mine]
            self.partial_scales.append(scales)
        return shard, scales.view(location.shape[:-1])

    def _load_float(self, module: nn.Module, location: TensorLocation, unit: int) -> Tensor:
        """This rank's shard, in the narrower of the stored and the compute type."""
        stored = self.reader.dtype(location.tensors[0])
        large = isinstance(module, FrozenLinear | FrozenEmbedding | FrozenExperts)
        narrow = large and len(location.shape) > 1 and stored.itemsize < self.dtype.itemsize
        kept = stored if narrow else self.dtype
        shard = self.sharder.allocate(location.shape.numel(), kept, unit)
        self._copy(location, unit, shard)
        return shard

    def _copy(self, location: TensorLocation, unit: int, shard: Tensor) -> None:
        """Fill the shard with the stored values, which are cast to its type.

        Values that need no conversion are read into the shard itself, without a copy.
        """
        rows = RowReader(location, self.reader)
        if rows.can_fill(shard):
            start, stop = self.sharder.bounds(location.shape.numel(), unit)
            rows.fill(shard[: stop - start], start)
            return
        for _, values, mine, target in self._blocks(location, unit):
            shard[target] = values.flatten()[mine].to(shard.dtype)

    def _blocks(
        self, location: TensorLocation, unit: int
    ) -> Iterator[tuple[slice, Tensor, slice, slice]]:
        """Read the rows that this rank's shard contains, some at a time.

        Yields:
            Indices of the rows, their values in the stored type, the range of these values that
            belongs to the shard, and its place in the shard.
        """
        start, stop = self.sharder.bounds(location.shape.numel(), unit)
        width = location.shape[-1] if len(location.shape) > 1 else 1
        reader = RowReader(location, self.reader)
        for rows, values in reader.blocks(start // width, -(-stop // width)):
            offset = rows.start * width
            # Other ranks may hold parts of the first and the last row.
            begin, end = max(start, offset), min(stop, rows.stop * width)
            mine, target = slice(begin - offset, end - offset), slice(begin - start, end - start)
            yield rows, values, mine, target


def _enable_checkpointing(model: PreTrainedModel) -> None:
    # Its name since transformers 5.24, and before.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})
    # transformers makes embeddings require a gradient, which only reentrant checkpointing needs.
    # ZeRO-3 would gather the table for an unused backward and never release it.
    model.disable_input_require_grads()
    for module in model.modules():
        # transformers recomputes only layers in training mode. Their children stay in evaluation
        # mode: a frozen base has no dropout.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
