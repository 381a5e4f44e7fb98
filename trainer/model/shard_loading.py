"""From a checkpoint straight into shards.

Every rank reads only the rows that its own part of a tensor touches, quantises them (rows are
quantised alone, so this is exact) and keeps them as its shard. Nobody ever holds a whole tensor,
and no weight travels between ranks; only the row scales do, once, at the end.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from trainer.model.safetensors_reader import SafetensorsReader, scales_name
from trainer.model.tensor_locations import RowReader, TensorLocation, locate_parameters
from trainer.runtime.errors import BadInput

Progress = Callable[[int], None]

#: Bytes read, quantised and put away at a time: what loading needs beyond the shards.
BLOCK_BYTES = 4 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class WeightSharder(Protocol):
    """What loading must know of the other ranks.

    Attributes:
        exchange: for rows of tables that are never gathered; None where this rank holds them all.
    """

    exchange: RowExchange | None

    def bounds(self, num_elements: int, unit: int = 1) -> tuple[int, int]:
        """Start and stop of this rank's part of a flat tensor, which is of whole ``unit``s."""

    def allocate(self, num_elements: int, dtype: torch.dtype, unit: int = 1) -> Tensor:
        """Memory for this rank's part of a flat tensor, padding included, zeroed."""

    def adopt(self, parameter: nn.Parameter, shard: Tensor) -> None:
        """Turn a parameter on ``meta`` into one of which this rank holds ``shard``."""

    def finish(self, scales: Sequence[Tensor], problems: Sequence[str]) -> None:
        """The one time ranks speak: any problem is raised on all of them; scales are completed.

        Args:
            scales: of each tensor, with zero for rows that this rank has not read; in place.
        """


@dataclass(frozen=True)
class LoadStats:
    """What loading cost: seconds, and bytes this rank read from disk."""

    seconds: float
    bytes_read: int


def load_shards(
    model: PreTrainedModel,
    files: BaseFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: WeightSharder,
    checkpointing: bool,
    progress: Progress = lambda _: None,
) -> tuple[PromptedBase, LoadStats]:
    """Fill a skeleton, tensor by tensor.

    Args:
        shard: takes over each parameter as soon as this rank's part of it is read.
        progress: called with the bytes read since the last call.

    Raises:
        BadInput: on all ranks, with every tensor that any of them cannot read or that holds NaN.
    """
    started = time.perf_counter()
    sources = locate_parameters(model, files.parameters.tensors)
    with return_freed_memory(), SafetensorsReader(files.tensors) as reader:
        loader = _WeightLoader(reader, shard, dtype, device, progress)
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                source = sources[f"{path}.{name}" if path else name]
                loader.load(module, name, parameter, source)
        shard.finish(loader.partial_scales, loader.problems)
        stats = LoadStats(time.perf_counter() - started, reader.bytes_read)
    model.requires_grad_(False)
    model.eval()
    if checkpointing:
        _enable_checkpointing(model)
    return PromptedBase(model, dtype), stats


class _WeightLoader:
    """Loads parameters one by one and remembers what the ranks must settle at the end."""

    def __init__(
        self,
        reader: SafetensorsReader,
        shard: WeightSharder,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.reader, self.shard, self.dtype, self.device = reader, shard, dtype, device
        self.progress = progress
        self.partial_scales: list[Tensor] = []
        self.problems: list[str] = []
        # Of parameters that are done, by id: tied ones come twice.
        self._scales: dict[int, Tensor | None] = {}
        self._rows: dict[int, Tensor] = {}

    def load(
        self, module: nn.Module, name: str, parameter: nn.Parameter, source: TensorLocation
    ) -> None:
        """Give a parameter its shard; a rank with a problem continues, as others wait for it."""
        key = id(parameter)
        holder = module if isinstance(module, FrozenEmbedding | FrozenHead) else None
        table = holder if name == "weight" else None
        if key not in self._scales:
            scales = None
            before = self.reader.bytes_read
            try:
                unit = parameter.shape[1] if table else 1  # whole rows, or single elements
                if parameter.dtype == torch.int8:
                    shard, scales = self._load_int8(source, unit)
                else:
                    shard = self._load_float(module, source, unit)
                if table:
                    # Detached: a view would keep the memory of what it is a view of.
                    self._rows[key] = shard.view(-1, unit).detach()
                else:
                    self.shard.adopt(parameter, shard)
            except BadInput as error:
                self.problems += error.problems
            self._scales[key] = scales
            self.progress(self.reader.bytes_read - before)
        if table and key in self._rows:
            table.hold(self._rows[key], self.shard.exchange)
        scales = self._scales[key]
        if scales is not None:
            setattr(module, absmax_name(name), scales)

    def _load_int8(self, source: TensorLocation, unit: int) -> tuple[Tensor, Tensor]:
        """This rank's part, quantised now or taken as it is stored, and the scales of all rows."""
        shard = self.shard.allocate(source.shape.numel(), torch.int8, unit)
        if self.reader.is_int8(source.tensors[0]):
            names = [scales_name(name) for name in source.tensors]
            scales = torch.cat([self.reader.read(name).flatten() for name in names])
            scales = scales.to(self.device, torch.float32)
            for block in self._blocks(replace(source, transposed=False), unit):
                shard[block.to] = block.values.flatten()[block.part]
        else:
            scales = torch.zeros(source.shape[:-1].numel(), device=self.device)
            for block in self._blocks(source, unit):
                quantized, scales[block.rows] = quantize_rows(block.values.to(self.device))
                shard[block.to] = quantized.flatten()[block.part]
            self.partial_scales.append(scales)
        return shard, scales.view(source.shape[:-1])

    def _load_float(self, module: nn.Module, source: TensorLocation, unit: int) -> Tensor:
        """This rank's part, in the narrower of stored and compute type."""
        stored = self.reader.dtype(source.tensors[0])
        large = isinstance(module, FrozenLinear | FrozenEmbedding | FrozenExperts)
        narrow = large and len(source.shape) > 1 and stored.itemsize < self.dtype.itemsize
        kept = stored if narrow else self.dtype
        shard = self.shard.allocate(source.shape.numel(), kept, unit)
        for block in self._blocks(source, unit):
            shard[block.to] = block.values.flatten()[block.part].to(kept)
        return shard

    def _blocks(self, source: TensorLocation, unit: int) -> Iterator[_Block]:
        """The rows that this rank's part touches, a few at a time."""
        start, stop = self.shard.bounds(source.shape.numel(), unit)
        width = source.shape[-1] if len(source.shape) > 1 else 1
        rows = RowReader(source, self.reader)
        for first, last in row_blocks(start // width, -(-stop // width), width):
            # The first and the last row may be shared with the ranks before and after.
            begin, end = max(start, first * width), min(stop, last * width)
            yield _Block(
                rows.read(first, last),
                slice(first, last),
                slice(begin - first * width, end - first * width),
                slice(begin - start, end - start),
            )


@dataclass(frozen=True)
class _Block:
    """Some rows of a tensor.

    Attributes:
        values: the rows, in the type they are stored in.
        rows: which rows these are.
        part: elements of ``values`` that are this rank's.
        to: where in the shard they go.
    """

    values: Tensor
    rows: slice
    part: slice
    to: slice


def row_blocks(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows ``start`` to ``stop`` in blocks that take BLOCK_BYTES in fp32."""
    size = max(1, BLOCK_BYTES // (4 * width))
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Have glibc return every freed allocation of at least 1 MiB to the system immediately.

    By default glibc raises its mmap threshold and keeps such memory for reuse. Blocks that were
    read and freed would then stay resident between the shards. Training benefits from reuse, so
    the thresholds are raised again at the end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:  # the upper limits of glibc's own adjustment: see mallopt(3)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def _enable_checkpointing(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers makes word embeddings ask for a gradient, which only reentrant checkpointing
    # needs: ZeRO-3 would gather the table for a backward that nobody reads, and never release it.
    model.disable_input_require_grads()
    for module in model.modules():
        # transformers recomputes only layers in training mode; their children stay in evaluation
        # mode, so that a frozen base never drops out.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
