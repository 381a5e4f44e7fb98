"""Headers of the base's weight files: of a folder, or of a hub model by range requests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from trainer.config import Base
from trainer.cost_model.base_shape import BaseShape, Header, read_base_shape
from trainer.model import hub
from trainer.model.base_tokenizer import GGUF, local_path, read_model_config
from trainer.model.families import family_of, layer_sizes
from trainer.model.model_folder import INDEX, SINGLE, check_folder, read_config, read_index
from trainer.model.quantization_config import check_table_storage
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json

#: Maximum length of the header of a safetensors file, as in the library.
MAX_HEADER_BYTES = 100_000_000
#: Families whose layers have inputs by token id, beside those with recurrent layers or padded rows.
UNPLANNED = ("gemma3n_text", "gemma4_text")
#: Sizes that config.json must state, under one of these names. transformers would fill in those of
#: another model.
_SIZES = (
    ("hidden_size", "n_embd", "d_model", "n_embed"),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
)
#: Settings of config.json with the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Tensors beside quantized values: scales, zero points, shapes, orders of columns.
_BESIDE_VALUES = re.compile(
    r"(_scale|_scale_inv|\.scale|\.qscale_(weight|act)|_zero_point|\.weight_shape|\.weight_g_idx)$"
)
#: Values of MXFP4 in a byte, and 8-bit values in a packed int32.
_FP4_IN_BYTE, _INT8_IN_WORD = 2, 4


def open_base_shape(settings: Base, itemsize: int) -> tuple[BaseShape, PretrainedConfig, int]:
    """Read the sizes of a base, its text config, and the bytes of its weight files.

    Args:
        itemsize: bytes per element of the compute type.

    Raises:
        BadInput: the model is missing or not supported, or its sizes do not follow from headers.
    """
    path = local_path(settings)
    if path is not None and path.suffix == GGUF:
        raise BadInput(
            f"base.model: plan reads the headers of safetensors files, and {settings.model!r} is a "
            "GGUF file; give the folder or hub id of the model that it was made from"
        )
    folder = path or hub.fetch(settings, ["config.json"], download=True)
    if path is not None:
        check_folder(folder, settings.model)
    config, quantization = read_model_config(folder, settings.model)
    text = config.get_text_config()
    _check_family(text, settings.model)
    _check_sizes(folder / "config.json")
    headers = dict(_local_headers(folder) if path is not None else hub.read_headers(settings))
    tensors = {name: Header(kind, tuple(shape)) for name, (kind, shape, _) in headers.items()}
    if quantization is not None and not quantization.get("load_in_8bit"):
        tensors = headers_of_values(tensors)
    shape = base_shape_of(tensors, config, settings, itemsize)
    check_table_storage(settings, tied=shape.head is shape.embedding)
    return shape, text, sum(num_bytes for _, _, num_bytes in headers.values())


def base_shape_of(
    headers: Mapping[str, Header], config: PretrainedConfig, settings: Base, itemsize: int
) -> BaseShape:
    """Derive the sizes of a base from the headers of its tensors and its config.

    Args:
        config: of the folder: of a text model or its multimodal container.

    Raises:
        BadInput: the sizes of the family do not follow from headers.
    """
    text = config.get_text_config()
    _check_family(text, settings.model)
    count = next((int(n) for key in _EXPERTS if (n := getattr(text, key, None))), 0)
    return read_base_shape(
        headers,
        settings,
        model_type=text.model_type,
        num_layers=text.num_hidden_layers,
        itemsize=itemsize,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        own_head=not getattr(text, "tie_word_embeddings", True),
        experts=(count, layer_sizes(text).experts_per_token),
    )


def _check_family(text: PretrainedConfig, name: str) -> None:
    family = family_of(text, name)
    if text.model_type in UNPLANNED or family.recurrent or not family.packed:
        raise BadInput(
            f"base.model: plan does not know the sizes of family {text.model_type!r} (recurrent "
            "layers, padded rows or inputs per layer); measure a short run: promptshard train "
            "RUN.yaml training.steps=20"
        )


def headers_of_values(headers: Mapping[str, Header]) -> dict[str, Header]:
    """Return the headers of the weights that a run makes from a quantized checkpoint.

    The counterpart of ``trainer.model.quantized_weights.combine_tensors``, which reads files with
    torch.
    """
    values = {}
    for name, header in headers.items():
        *rows, last = header.shape or (1,)
        blocks, packed = name.removesuffix("_blocks"), name.removesuffix("_packed")
        if _BESIDE_VALUES.search(name) or f"{name.removesuffix('_scales')}_blocks" in headers:
            continue
        if blocks != name:
            *rows, groups = rows
            values[blocks] = Header("F32", (*rows, groups * last * _FP4_IN_BYTE))
        elif packed != name:
            values[packed] = Header("F32", (*rows, last * _INT8_IN_WORD))
        elif header.type.startswith("F8") or header.type == "I8":
            values[name] = Header("F32", header.shape)
        else:
            values[name] = header
    return values


def _check_sizes(path: Path) -> None:
    raw = read_config(path)
    text = raw.get("text_config")
    sections = [raw, text if isinstance(text, dict) else {}]
    missing = [
        names[0] for names in _SIZES if not any(name in s for s in sections for name in names)
    ]
    if missing:
        raise BadInput(
            f"{path}: has no {', '.join(missing)}, from which plan computes activations; use the "
            "config.json that belongs to these weights"
        )


def _local_headers(folder: Path) -> Iterator[tuple[str, hub.TensorHeader]]:
    """Headers of the weight files of a folder that transformers reads."""
    files = [SINGLE] if (folder / SINGLE).is_file() else sorted(set(read_index(folder)))
    if not files:
        raise BadInput(
            f"base.model: {str(folder)!r} has neither {SINGLE} nor {INDEX}; plan reads the headers "
            "of safetensors files"
        )
    for name in files:
        for key, entry in _header(folder / name).items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                yield key, (entry["dtype"], entry["shape"], end - begin)


def _header(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size):
                raise ValueError("it has no header")
            header = parse_json(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is not an object")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; copy or download the model again") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{path}: is damaged ({error}); copy or download it again") from None
    return header
