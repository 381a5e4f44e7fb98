"""From a checkpoint straight into shards.

Every rank reads only the rows that its own part of a tensor touches, quantises them (rows are
quantised alone, so this is exact) and keeps them as its shard. Nobody ever holds a whole tensor,
and no weight travels between ranks; only the row scales do, once, at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.base.files import BaseFiles, SafetensorsReader
from trainer.base.linear import FrozenEmbedding, FrozenLinear
from trainer.base.model import PromptedBase
from trainer.base.quantization import quantize_rows
from trainer.errors import BadInput

Progress = Callable[[int], None]

#: Bytes read, quantised and put away at a time: what loading needs beyond the shards.
BLOCK_BYTES = 4 << 20
#: bitsandbytes keeps the scales of ``x.weight`` in ``x.SCB``.
SCALES_SUFFIX = "SCB"


class Sharder(Protocol):
    """What loading must know of the other ranks."""

    def bounds(self, num_elements: int) -> tuple[int, int]:
        """Start and stop of this rank's part of a flat tensor."""

    def allocate(self, num_elements: int, dtype: torch.dtype) -> Tensor:
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


def load_base(
    model: PreTrainedModel,
    files: BaseFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: Sharder,
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
    with SafetensorsReader(files) as reader:
        loader = _Loader(reader, shard, dtype, device, progress)
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                loader.load(module, parameter, f"{path}.{name}" if path else name)
        shard.finish(loader.partial_scales, loader.problems)
        stats = LoadStats(time.perf_counter() - started, reader.bytes_read)
    model.requires_grad_(False)
    model.eval()
    if checkpointing:
        _enable_checkpointing(model)
    return PromptedBase(model, dtype), stats


class _Loader:
    """Loads parameters one by one and remembers what the ranks must settle at the end."""

    def __init__(
        self,
        reader: SafetensorsReader,
        shard: Sharder,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.reader, self.shard, self.dtype, self.device = reader, shard, dtype, device
        self.progress = progress
        self.partial_scales: list[Tensor] = []
        self.problems: list[str] = []
        self._scales: dict[int, Tensor | None] = {}  # by the id of a parameter that is done

    def load(self, module: nn.Module, parameter: nn.Parameter, name: str) -> None:
        """Give a parameter its shard; a rank with a problem goes on, so that none waits for it."""
        if id(parameter) not in self._scales:
            scales = None
            before = self.reader.bytes_read
            try:
                if parameter.dtype == torch.int8:
                    scales = self._load_int8(parameter, name)
                else:
                    self._load_float(module, parameter, name)
            except BadInput as error:
                self.problems += error.problems
            self._scales[id(parameter)] = scales
            self.progress(self.reader.bytes_read - before)
        scales = self._scales[id(parameter)]
        if scales is not None:
            module.absmax = scales

    def _load_int8(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Quantise this rank's rows, or take them as they are stored; gives the row scales."""
        stored = self.reader.find(name)
        assert stored is not None, name
        *leading, width = parameter.shape
        count = parameter.numel()
        start, stop = self.shard.bounds(count)
        shard = self.shard.allocate(count, torch.int8)
        if stored.dtype == torch.int8:
            scales = self.reader.read(scales_name(name)).to(self.device, torch.float32)
            for begin, end in _blocks(start, stop, BLOCK_BYTES):
                shard[begin - start : end - start] = self.reader.read_flat(name, begin, end)
        else:
            scales = torch.zeros(count // width, device=self.device)
            rows = _blocks(start // width, math.ceil(stop / width), BLOCK_BYTES // (4 * width))
            for first, last in rows if stop > start else ():
                values = self.reader.read_flat(name, first * width, last * width).to(self.device)
                quantized, scales[first:last] = quantize_rows(values.view(-1, width))
                # The first and the last row may be shared with the ranks before and after.
                begin, end = max(start, first * width), min(stop, last * width)
                flat = quantized.view(-1)[begin - first * width : end - first * width]
                shard[begin - start : end - start] = flat
            self.partial_scales.append(scales)
        self.shard.adopt(parameter, shard)
        return scales.view(leading)

    def _load_float(self, module: nn.Module, parameter: nn.Parameter, name: str) -> None:
        """Keep this rank's part in the narrower of stored and compute type."""
        stored = self.reader.find(name)
        assert stored is not None, name
        assert stored.dtype is not None, name
        large = isinstance(module, FrozenLinear | FrozenEmbedding) and parameter.dim() > 1
        narrow = large and stored.dtype.itemsize < self.dtype.itemsize
        kept = stored.dtype if narrow else self.dtype
        start, stop = self.shard.bounds(parameter.numel())
        shard = self.shard.allocate(parameter.numel(), kept)
        for begin, end in _blocks(start, stop, BLOCK_BYTES // stored.dtype.itemsize):
            shard[begin - start : end - start] = self.reader.read_flat(name, begin, end)
        self.shard.adopt(parameter, shard)


def scales_name(name: str) -> str:
    """Where an 8-bit folder keeps the row scales of a weight."""
    return f"{name.rpartition('.')[0]}.{SCALES_SUFFIX}"


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    size = max(1, size)
    for begin in range(start, stop, size):
        yield begin, min(begin + size, stop)


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
