"""From a checkpoint straight into shards.

The model is built on ``meta``; then, module by module, its tensors are read, quantised, handed to
``shard`` and forgotten. No rank ever holds more than its shard and one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.base.attention import PACKED
from trainer.base.files import BaseFiles, SafetensorsReader
from trainer.base.linear import FrozenEmbedding, FrozenLinear
from trainer.base.model import PromptedBase
from trainer.base.quantization import quantize_rows
from trainer.config import Base
from trainer.errors import BadInput

Shard = Callable[[nn.Module], None]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class LoadStats:
    """What loading cost: seconds, and bytes this rank read from disk."""

    seconds: float
    bytes_read: int


def build_skeleton(
    files: BaseFiles, settings: Base, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model with frozen layers, on ``meta``, its non-persistent buffers on ``device``.

    Args:
        dtype: type of activations; also of weights that are not quantised, where the checkpoint's
            own type is not narrower.

    Raises:
        BadInput: with every tensor that is missing or of another shape; no weight is read.
    """
    files.config._attn_implementation = PACKED
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(files.config, dtype=dtype)
    head = model.get_output_embeddings()
    quantized = settings.quantization == "int8"
    _replace_layers(model, keep_float={id(head)}, quantized=quantized, dtype=dtype)
    _tie(model)
    _rebuild_buffers(model, device)
    with SafetensorsReader(files) as reader:
        problems = [
            problem
            for name, parameter in model.named_parameters()
            if (problem := reader.problem(name, parameter.shape))
        ]
    if problems:
        raise BadInput(problems[:10])
    return model


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
    with SafetensorsReader(files) as reader:
        for path, module in model.named_modules():
            before = reader.bytes_read
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    stored = reader.read(f"{path}.{name}" if path else name)
                    _fill(module, parameter, stored, dtype, device)
            if reader.bytes_read > before:
                shard(module)
                progress(reader.bytes_read - before)
        stats = LoadStats(time.perf_counter() - started, reader.bytes_read)
    model.requires_grad_(False)
    model.eval()
    if checkpointing:
        _enable_checkpointing(model)
    return PromptedBase(model, dtype), stats


def _replace_layers(
    model: PreTrainedModel, keep_float: set[int], quantized: bool, dtype: torch.dtype
) -> None:
    """Put frozen layers where the model has trainable ones. The head stays in its float type."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer: nn.Module = FrozenLinear(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    quantized=quantized and id(child) not in keep_float,
                )
            elif child is model.get_input_embeddings():
                layer = FrozenEmbedding(child.num_embeddings, child.embedding_dim, dtype)
            else:
                continue
            setattr(parent, name, layer)


def _tie(model: PreTrainedModel) -> None:
    if model.config.tie_word_embeddings:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, FrozenLinear)
        assert isinstance(embedding, FrozenEmbedding)
        head.weight = embedding.weight


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what no checkpoint holds: rotary frequencies. Scales come with their weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            own = [b for n, b in child.named_buffers(recurse=False) if n != "absmax"]
            if not any(buffer.is_meta for buffer in own):
                continue
            try:
                rebuilt = type(child)(model.config).to(device)
            except TypeError:
                raise BadInput(
                    f"base.model: cannot rebuild the buffers of {type(child).__name__}; "
                    "this model needs support of its own"
                ) from None
            setattr(parent, name, rebuilt)


def _fill(
    module: nn.Module,
    parameter: nn.Parameter,
    stored: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a parameter its values: quantised, or in the narrower of stored and compute type."""
    if parameter.dtype == torch.int8:
        assert isinstance(module, FrozenLinear)
        weight, absmax = quantize_rows(stored.to(device))
        module.absmax = absmax
    else:
        large = isinstance(module, FrozenLinear | FrozenEmbedding) and stored.dim() > 1
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
