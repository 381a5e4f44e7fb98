"""From a checkpoint straight into shards.

Module by module, the tensors of a skeleton are read, quantised, handed to ``shard`` and
forgotten. No rank ever holds more than its shard and one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.base.experts import FrozenExperts
from trainer.base.families import family_of
from trainer.base.files import BaseFiles, SafetensorsReader
from trainer.base.linear import FrozenEmbedding, FrozenLinear, absmax_name
from trainer.base.model import PromptedBase
from trainer.base.quantization import quantize_rows
from trainer.base.sources import find_sources

Shard = Callable[[nn.Module], None]
Progress = Callable[[int], None]


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
    shard: Shard,
    checkpointing: bool,
    progress: Progress = lambda _: None,
) -> tuple[PromptedBase, LoadStats]:
    """Fill a skeleton, module by module.

    Args:
        shard: takes over the parameters of one module as soon as they are read.
        progress: called with the bytes read since the last call.

    Raises:
        BadInput: if a tensor cannot be read or is not finite.
    """
    started = time.perf_counter()
    done: set[int] = set()
    sources = find_sources(model, files.tensors, family_of(model.config, files.name))
    with SafetensorsReader(files) as reader:
        for path, module in model.named_modules():
            before = reader.bytes_read
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    stored = sources[f"{path}.{name}" if path else name].read(reader)
                    _fill(module, name, parameter, stored, dtype, device)
            if reader.bytes_read > before:
                shard(module)
                progress(reader.bytes_read - before)
        stats = LoadStats(time.perf_counter() - started, reader.bytes_read)
    model.requires_grad_(False)
    model.eval()
    if checkpointing:
        _enable_checkpointing(model)
    return PromptedBase(model, dtype), stats


def _fill(
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
    stored: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a parameter its values: quantised, or in the narrower of stored and compute type."""
    if parameter.dtype == torch.int8:
        weight, absmax = quantize_rows(stored.to(device))
        setattr(module, absmax_name(name), absmax)
    else:
        frozen = isinstance(module, FrozenLinear | FrozenEmbedding | FrozenExperts)
        large = frozen and stored.dim() > 1
        narrow = large and stored.element_size() < dtype.itemsize
        weight = stored.to(device, stored.dtype if narrow else dtype)
    # ``.data`` cannot leave meta; swapping keeps the identity, so that tied weights stay tied.
    torch.utils.swap_tensors(parameter, nn.Parameter(weight, requires_grad=False))


def _enable_checkpointing(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        # transformers recomputes only layers in training mode; their children stay in evaluation
        # mode, so that a frozen base never drops out.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
