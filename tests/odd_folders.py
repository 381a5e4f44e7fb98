"""Small model folders whose flags, names or files disagree, as those of real models do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from benchmarks.random_base import make_tokenizer
from tests.family_bases import family_config, randomize, save_family

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Head = Literal["absent", "same", "different", "alone"]

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
#: Containers by model_type: the case of their text model, and settings of their own.
CONTAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {"vision_config": _VISION, "mm_tokens_per_image": 4}),
    "gemma4": (
        "gemma4-per-layer",
        {
            "vision_config": {
                **_VISION,
                **{"num_key_value_heads": 1, "head_dim": 16, "pooling_kernel_size": 1},
                "position_embedding_size": 16,
            },
            "audio_config": None,
        },
    ),
    "ministral3": ("ministral3", {"vision_config": {"model_type": "pixtral", **_VISION}}),
    "qwen3_5": (
        "qwen3_5",
        {
            "vision_config": {
                **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1},
                **{"patch_size": 14, "out_hidden_size": 48},
            }
        },
    ),
    "mistral3": ("mistral", {"vision_config": {"model_type": "pixtral", **_VISION}}),
    "qwen2_audio": (
        "qwen2",
        {
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 1,
                "encoder_ffn_dim": 16,
            }
        },
    ),
    "aya_vision": (
        "cohere2",
        {"vision_config": {"model_type": "siglip_vision_model", **_VISION}},
    ),
    "llama4": (
        "llama4",
        {
            "vision_config": {
                **_VISION,
                **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 16),
                **dict.fromkeys(("vision_input_dim", "vision_output_dim"), 16),
            }
        },
    ),
    "llava": ("llama", {"vision_config": {"model_type": "clip_vision_model", **_VISION}}),
}


def save_container(folder: Path, container: str) -> Path:
    """Write a multimodal folder whose text model is a family's case."""
    case, settings = CONTAINERS[container]
    text = {**family_config(case).to_dict(), "tie_word_embeddings": False}
    kind = {"ministral3": "mistral3"}.get(container, container)
    config = AutoConfig.for_model(kind, text_config=text, tie_word_embeddings=False, **settings)
    kinds = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    model = kind.from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def set_flags(folder: Path, top: bool | None, text: bool | None = None) -> None:
    """Write ``tie_word_embeddings`` at the top and in ``text_config``; None removes it."""

    def change(config: dict[str, Any]) -> None:
        for section, flag in ((config, top), (config.get("text_config", {}), text)):
            section.pop("tie_word_embeddings", None)
            if flag is not None:
                section["tie_word_embeddings"] = flag

    edit_config(folder, change)


def set_head(folder: Path, head: Head) -> None:
    """Store a head beside the word embeddings, or not; ``alone``: the head and no embeddings."""
    table_name, head_name = end_names(folder)

    def change(tensors: dict[str, Tensor]) -> None:
        table = tensors[table_name]
        tensors.pop(head_name, None)
        if head == "same":
            tensors[head_name] = table.clone()
        elif head == "different":
            generator = torch.Generator().manual_seed(5)
            tensors[head_name] = torch.randn(table.shape, generator=generator) * 0.15
        elif head == "alone":
            tensors[head_name] = tensors.pop(table_name)

    edit_tensors(folder, change)


def end_names(folder: Path) -> tuple[str, str]:
    """Return the names of word embeddings and head in a folder's weight file."""
    names = sorted(load_file(folder / SINGLE))
    tables = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    table = next(name for name in names if name.endswith(tables))
    head = next(
        (name for name in names if name.endswith(("lm_head.weight", "embed_out.weight"))), ""
    )
    if not head:
        head = "language_model.lm_head.weight" if "language_model" in table else "lm_head.weight"
    return table, head


def shard(folder: Path, tensors: dict[str, Tensor], *, index: dict[str, str] | None = None) -> None:
    """Write tensors as two files and their index, beside what is there."""
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 1}, "weight_map": index or weight_map}
    (folder / INDEX).write_text(json.dumps(content))


@cache
def plain(root: Path, case: str) -> Path:
    return save_family(root / f"plain-{case}", case)


@cache
def container(root: Path, kind: str) -> Path:
    return save_container(root / f"container-{kind}", kind)
