"""Build the model on ``meta``, with frozen layers in place of trainable ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from trainer.config import Base
from trainer.model.attention.family_overrides import replace_attention
from trainer.model.attention.interface import PACKED
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.families import embedding_scale, family_of, logit_scale_and_cap
from trainer.model.generation_config import check_logits_processors
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.layers.fused_ops import fuse_operations
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.moe import FrozenExperts, is_experts
from trainer.model.llama4 import adapt_llama4, scale_queries
from trainer.model.per_layer_inputs import per_layer_table
from trainer.model.quantization_config import check_table_storage
from trainer.model.safetensors_reader import SafetensorsReader, scales_name
from trainer.model.tensor_locations import TensorLocation, locate_parameters
from trainer.model.transformers_model import build_transformers_model
from trainer.runtime.errors import BadInput

#: Maximum bytes of non-persistent buffers (rotary frequencies, masks); no known model has as many.
MAX_BUFFER_BYTES = 1 << 30


def build_meta_model(
    files: BaseFiles, settings: Base, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Build the model with frozen layers on ``meta`` and its non-persistent buffers on ``device``.

    Args:
        dtype: type of activations, and of unquantized weights unless their stored type is narrower.

    Raises:
        BadInput: with every tensor of an unexpected shape or type; no weight is read.
    """
    family = family_of(files.config, files.name)
    model = build_transformers_model(_frozen_config(files.config), files.name, dtype=dtype)
    model.config._attn_implementation = PACKED if family.packed else family.cached_attention
    model.generation_config = files.generation
    _rebuild_buffers(model, device)
    adapt_llama4(model)
    _replace_layers(model, quantized=settings.quantization == "int8", dtype=dtype)
    scale_queries(model)
    with SafetensorsReader(files.tensors) as reader:
        stored = files.parameters.tensors
        _quantize_ends(model, settings, lambda name: reader.is_int8(stored[name][0]))
        _tie(model)
        if family.packed:
            replace_attention(model)
        fuse_operations(model)
        locations = locate_parameters(model, files.parameters, files.tensors)
        int8 = {name for name, p in model.named_parameters() if p.dtype == torch.int8}
        problems = [
            problem
            for name in (*dict(model.named_parameters()), *dict(model.named_buffers()))
            if name in locations
            for problem in _problems(reader, locations[name], name in int8)
        ]
    if problems:
        raise BadInput(problems[:10])
    check_logits_processors(model, files.name)  # last: it allocates logits of the full vocabulary
    return model


def locate_int8_parameters(model: PreTrainedModel, files: BaseFiles) -> dict[str, TensorLocation]:
    """Return the locations of the weights that a model on ``meta`` stores in int8, by parameter."""
    locations = locate_parameters(model, files.parameters, files.tensors)
    int8 = [name for name, p in model.named_parameters() if p.dtype == torch.int8]
    return {name: locations[name] for name in int8}


def _problems(reader: SafetensorsReader, location: TensorLocation, quantized: bool) -> list[str]:
    if not reader.is_int8(location.tensors[0]):
        return location.problems(reader)
    if not quantized:
        return [
            f"base.model: {location.tensors[0]!r} is stored in 8 bits, but would be loaded as a "
            "float type; use base.quantization: int8, or the original model"
        ]
    problems = location.problems(reader)
    for name in location.tensors:
        layout = f"{name}_format"
        if reader.tensors.get(layout) is not None and bool(reader.read(layout).any()):
            problems.append(
                f"{reader.tensors[name].path}: {name!r} is stored in a layout of older "
                "bitsandbytes; save the model again with a newer one"
            )
        scales = scales_name(name)
        if reader.tensors.get(scales) is None:
            problems.append(
                f"{reader.tensors[name].path}: {name!r} is stored in 8 bits, but its row scales "
                f"{scales!r} are missing; write the folder again (promptshard prepare)"
            )
        elif problem := reader.problem(scales, location.stored_shape[:-1]):
            problems.append(problem)
    return problems


def _quantize_ends(
    model: PreTrainedModel, settings: Base, is_stored_int8: Callable[[str], bool]
) -> None:
    """Make embeddings and head int8 if the run file sets int8 or the checkpoint stores int8."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {module: path for path, module in model.named_modules()}
    tied = model.config.tie_word_embeddings
    check_table_storage(settings, tied=tied)
    tables = [(embedding, settings.embeddings), (head, settings.head)]
    if of_layers := per_layer_table(model):
        tables.append((of_layers, settings.embeddings))
    for layer, setting in tables:
        source = embedding if tied and layer is head else layer
        stored = is_stored_int8(f"{paths[source]}.weight")
        if setting == "int8" or (stored and settings.quantization == "int8"):
            int8 = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
            layer.weight = nn.Parameter(int8, requires_grad=False)
            layer.absmax = torch.empty(len(int8), dtype=torch.float32, device="meta")


def _frozen_config(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a config without dropout, because checkpointed layers run in training mode."""
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in name or name.endswith("jitter_noise")):
            setattr(config, name, 0.0)
    for name in ("output_router_logits", "slow_but_exact"):
        if getattr(config, name, False):
            setattr(config, name, False)
    config._is_quantized = True  # Mamba layers then call linear layers and do not read weights
    return config


def _replace_layers(model: PreTrainedModel, quantized: bool, dtype: torch.dtype) -> None:
    """Replace trainable layers with frozen ones; the head is not quantized here."""
    head = model.get_output_embeddings()
    tables = {model.get_input_embeddings(), per_layer_table(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            layer: nn.Module
            if child in tables:
                scale = embedding_scale(child, model.config)
                layer = FrozenEmbedding(child.num_embeddings, child.embedding_dim, dtype, scale)
            elif is_experts(child):
                layer = FrozenExperts(child, quantized)
            elif isinstance(child, nn.Linear | Conv1D) and not isinstance(child, Llama4Router):
                transposed = isinstance(child, Conv1D)
                n, k = child.weight.T.shape if transposed else child.weight.shape
                bias = child.bias is not None
                if child is head:
                    layer = FrozenHead(k, n, bias, quantized=False, transposed=transposed)
                    layer.scale, layer.softcap = logit_scale_and_cap(model)
                else:
                    layer = FrozenLinear(k, n, bias, quantized, transposed)
            else:
                continue
            setattr(parent, name, layer)


def _tie(model: PreTrainedModel) -> None:
    if model.config.tie_word_embeddings:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, FrozenLinear)
        assert isinstance(embedding, FrozenEmbedding)
        head.weight, embedding.tied = embedding.weight, True


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute non-persistent buffers (rotary frequencies, tables of sines).

    As in transformers' loading, each family's ``_init_weights`` fills these buffers and leaves
    parameters on ``meta`` unchanged.
    """
    sizes = {path: buffer.nbytes for path, buffer in model.named_buffers() if buffer.is_meta}
    if sum(sizes.values()) > MAX_BUFFER_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise BadInput(
            f"base.model: config.json requires tables of {sum(sizes.values()) / 1e9:,.1f} GB "
            f"besides the weights ({largest}), more than any model has; use the config.json that "
            "belongs to these weights"
        )
    table = model.get_input_embeddings()
    unset: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            computed = name in module._non_persistent_buffers_set and module is not table
            if buffer.is_meta and computed:
                nan = torch.full(buffer.shape, torch.nan, device=device)
                module._buffers[name] = nan.to(buffer.dtype)
                unset[path] = module
    # Falcon-H1's model fills buffers of its layers; Gemma 3n's reads attributes of its own.
    models = {path: m for path, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    with torch.no_grad():
        for path, module in (*unset.items(), *(models.items() if unset else ())):
            owners = [own for own in models if f"{path}.".startswith(f"{own}." if own else "")]
            models[max(owners, key=len)]._init_weights(module)
    for path, module in unset.items():
        if any(not buffer.isfinite().all() for buffer in _computed(module)):
            raise BadInput(
                f"base.model: cannot rebuild the buffers of {path} ({type(module).__name__}); "
                "this model is not supported"
            )


def _computed(module: nn.Module) -> list[torch.Tensor]:
    names = module._non_persistent_buffers_set
    return [buffer for name, buffer in module.named_buffers(recurse=False) if name in names]
