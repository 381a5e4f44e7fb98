"""Check folders of PEFT adapters before the base is loaded. Imports no torch.

Virtual tokens, and keys and values per layer, are used as prompts. LoRA and IA3 change linear
layers. Other kinds, and options of these that change more than linear layers, are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import resolve_path
from trainer.prompts.saved_prompts import (
    KEYS_AND_VALUES,
    SEGMENT,
    SETTINGS,
    VIRTUAL_TOKENS,
    WEIGHTS,
    find_source,
    tensor_shapes,
)
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

#: What PEFT writes before the name of a layer.
LAYER_PREFIX = "base_model.model."
#: Tensor of a layer -> its part in the adapter.
_PARTS = {
    "LORA": re.compile(r"(.+)\.(lora_A|lora_B)\.weight"),
    "IA3": re.compile(r"(.+)\.(ia3_l)"),
}
#: Settings of a LoRA adapter that do more than add a product to linear layers: values that do not.
_LORA_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "arrow_config": (None,),
}
_IA3_PLAIN: dict[str, tuple[Any, ...]] = {"modules_to_save": (None, [])}


@dataclass(frozen=True)
class PromptAdapter:
    """An adapter with virtual tokens, or keys and values.

    Attributes:
        name: of the folder.
        num_bytes: size of its weights.
        is_inside: the virtual tokens were trained inside text (``segment.json``).
    """

    name: str
    folder: Path
    num_bytes: int
    is_inside: bool = False


@dataclass(frozen=True)
class WeightAdapter:
    """A LoRA or IA3 adapter.

    Attributes:
        kind: ``LORA`` or ``IA3``.
        settings: ``adapter_config.json``.
        layers: name of a linear layer -> part of the adapter -> (tensor, shape).
    """

    name: str
    folder: Path
    num_bytes: int
    kind: str
    settings: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]


def read_adapter(path: str, base: str, *, force: bool = False) -> PromptAdapter | WeightAdapter:
    """Check the folder of an adapter; its weights are not read.

    Args:
        base: ``base.model`` of the run.
        force: accept an adapter that names another base.

    Raises:
        BadInput: no adapter, pickled weights, a kind that cannot be used, or another base.
    """
    folder = resolve_path(path)
    try:
        if not folder.is_dir() or not (folder / SETTINGS).is_file():
            what = f"has no {SETTINGS}" if folder.is_dir() else "no such folder"
            raise BadInput(f"{folder}: {what}; give the folder of a PEFT adapter")
        settings = read_json_object(folder / SETTINGS)
        shapes = tensor_shapes(folder)
        kind = str(settings.get("peft_type"))
        name = re.sub(r"[^A-Za-z0-9._-]", "_", folder.absolute().resolve().name) or "adapter"
        size = (folder / WEIGHTS).stat().st_size
        if not force:
            _check_base(folder, settings.get("base_model_name_or_path"), base)
        if kind in (*VIRTUAL_TOKENS, *KEYS_AND_VALUES):
            find_source(str(folder))
            return PromptAdapter(name, folder, size, (folder / SEGMENT).is_file())
        if kind not in _PARTS:
            known = ", ".join([*_PARTS, *VIRTUAL_TOKENS, *KEYS_AND_VALUES])
            raise BadInput(
                f"{folder}: adapters of type {kind} are not supported; known: {known}. Merge it "
                "into a copy of the base with PEFT, and run promptshard with that base"
            )
        layers = _layers(folder, kind, settings, shapes)
        return WeightAdapter(name, folder, size, kind, settings, layers)
    except BadInput as error:
        raise BadInput(f"--adapter: {problem}" for problem in error.problems) from None


def _check_base(folder: Path, named: Any, base: str) -> None:
    if not named or named == base:
        return
    ours, theirs = resolve_path(base), resolve_path(str(named))
    same = os.path.exists(ours) and os.path.exists(theirs) and os.path.samefile(ours, theirs)
    if not same:
        raise BadInput(
            f"{folder}: was trained for the base {named!r}, and the run has {base!r}. With another "
            "base the score means nothing. If both are the same model at two "
            "places, use --force"
        )


def _layers(
    folder: Path,
    kind: str,
    settings: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Group the tensors of an adapter by layer."""
    plain = _LORA_PLAIN if kind == "LORA" else _IA3_PLAIN
    problems = [
        f"{folder}: {name}: {settings[name]} of {kind} is not supported; merge the adapter into a "
        "copy of the base with PEFT, and run promptshard with that base"
        for name, values in plain.items()
        if settings.get(name) not in values
    ]
    if problems:
        raise BadInput(problems)
    layers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for tensor, shape in shapes.items():
        match = _PARTS[kind].fullmatch(tensor.removeprefix(LAYER_PREFIX))
        if match is None or len(shape) != 2:
            problems.append(
                f"{folder}: tensor {tensor!r} is not a {kind} of a linear layer; embeddings, heads "
                "and experts cannot be adapted here"
            )
        else:
            layers.setdefault(match[1], {})[match[2]] = tensor, shape
    parts = {"lora_A", "lora_B"} if kind == "LORA" else {"ia3_l"}
    problems += [
        f"{folder}: layer {n!r} lacks a tensor" for n, p in layers.items() if set(p) != parts
    ]
    if not problems and not layers:
        problems.append(f"{folder}: has no tensors")
    if problems:
        raise BadInput(problems[:5])
    return layers
