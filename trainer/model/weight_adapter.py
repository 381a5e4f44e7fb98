"""Apply a LoRA or IA3 adapter to the frozen linear layers of a base, without changing its weights.

LoRA (arXiv 2106.09685): ``y + s * (x @ A.T) @ B.T``. IA3 (arXiv 2205.05638): ``y * l``, in
feed-forward layers ``(x * l) @ W.T``. ``y`` is the output of the int8 layer.

Shape letters: K input features, N output features, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.lm_head import FrozenHead
from trainer.prompts.adapter_files import WeightAdapter
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.runtime.errors import BadInput


def check_layers(model: nn.Module, adapter: WeightAdapter) -> None:
    """Raise ``BadInput`` unless all layers of an adapter are linear layers of the model."""
    modules, problems = dict(model.named_modules()), []
    for name, parts in adapter.layers.items():
        layer = modules.get(name)
        if not isinstance(layer, FrozenLinear) or isinstance(layer, FrozenHead):
            problems.append(
                f"--adapter: {adapter.folder}: the base has no linear layer {name!r} that can be "
                "adapted (heads, embeddings and experts cannot)"
            )
            continue
        n, k = layer.out_features, layer.in_features
        shapes = {part: shape for part, (_, shape) in parts.items()}
        if adapter.kind == "LORA":
            fits = shapes["lora_A"][1] == k and shapes["lora_B"][0] == n
            fits = fits and shapes["lora_A"][0] == shapes["lora_B"][1]
        else:
            fits = shapes["ia3_l"] in ((n, 1), (1, k))
        if not fits:
            problems.append(
                f"--adapter: {adapter.folder}: {name!r} has the shapes {shapes}, and the layer of "
                f"this base is {n} by {k}; use the base that the adapter was trained for"
            )
    if problems:
        raise BadInput(problems[:5])


def load_tensors(adapter: WeightAdapter, device: torch.device) -> dict[str, Tensor]:
    """Read an adapter's tensors in fp32; raises ``BadInput`` if the file is damaged."""
    try:
        tensors = load_file(adapter.folder / WEIGHTS)
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"--adapter: {adapter.folder / WEIGHTS}: is damaged: {error}") from None
    return {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}


@contextmanager
def applied(
    model: nn.Module, adapter: WeightAdapter, tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within the context, the layers of the model compute with the adapter."""
    modules = dict(model.named_modules())
    hooks = []
    for name, parts in adapter.layers.items():
        layer = modules[name]
        own = {part: tensors[tensor] for part, (tensor, _) in parts.items()}
        if adapter.kind == "LORA":
            scale = _scale(adapter.settings, name)
            hooks.append(layer.register_forward_hook(_lora(own["lora_A"], own["lora_B"], scale)))
        elif _is_feedforward(adapter.settings, name):
            hooks.append(layer.register_forward_pre_hook(_scaled_input(own["ia3_l"].flatten())))
        else:
            hooks.append(layer.register_forward_hook(_scaled_output(own["ia3_l"].flatten())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _lora(a_rK: Tensor, b_Nr: Tensor, scale: float) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        x = inputs[0].to(a_rK.dtype)
        return y + ((x @ a_rK.T) @ b_Nr.T * scale).to(y.dtype)

    return hook


def _scaled_output(l_N: Tensor) -> Callable[..., Tensor]:
    return lambda module, inputs, y: y * l_N.to(y.dtype)


def _scaled_input(l_K: Tensor) -> Callable[..., Any]:
    return lambda module, inputs: (inputs[0] * l_K.to(inputs[0].dtype), *inputs[1:])


def _scale(settings: Mapping[str, Any], layer: str) -> float:
    """``lora_alpha / r`` of a layer, or ``lora_alpha / sqrt(r)`` with rsLoRA (arXiv 2312.03732)."""
    rank = _pattern(settings.get("rank_pattern"), layer, settings.get("r", 8))
    alpha = _pattern(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pattern(patterns: Any, layer: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a layer's name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(default)


def _is_feedforward(settings: Mapping[str, Any], layer: str) -> bool:
    names = settings.get("feedforward_modules") or []
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)
