"""The model's structure on ``meta``: frozen layers in place of trainable ones, no weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.base.attention import PACKED
from trainer.base.files import BaseFiles, SafetensorsReader
from trainer.base.linear import FrozenEmbedding, FrozenLinear
from trainer.config import Base
from trainer.errors import BadInput


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
