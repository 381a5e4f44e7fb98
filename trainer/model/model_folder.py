"""Check a model folder, and list the tensors of the weight files that transformers reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

if TYPE_CHECKING:
    from trainer.model.safetensors_reader import StoredTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: All files except weights: config, index of the weight files, tokenizer.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
#: Names of torch.distributed checkpoints, which transformers prefers to all other files.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_FILE_NAME = re.compile(r"[^\0]{1,255}")
#: Maximum number of layers. transformers creates lists of that length while reading a config.
MAX_LAYERS = 100_000


def check_folder(folder: Path, name: str) -> None:
    """Raise BadInput with all files that transformers would read but this program does not."""
    if not (folder / "config.json").is_file():
        if gguf := sorted(folder.glob("*.gguf")):
            raise BadInput(
                f"base.model: {name!r} has no config.json, but a GGUF file; name the file itself: "
                f"base.model: {gguf[0]}"
            )
        raise BadInput(
            f"base.model: {name!r} has no config.json; use the folder that contains the "
            "model's config.json and safetensors files"
        )
    problems = [
        f"{path}: {_missing_reason(path)}; copy or download the model again"
        for pattern in SMALL_FILES
        for path in sorted(folder.glob(pattern))
        if not path.is_file()
    ]
    if (folder / "adapter_config.json").is_file():
        problems.append(
            f"{folder / 'adapter_config.json'}: transformers would add this adapter to the model; "
            "merge it first (PEFT: model.merge_and_unload().save_pretrained(FOLDER)), or move it "
            "to another folder"
        )
    distributed = sorted(p.name for p in folder.iterdir() if _DISTRIBUTED.fullmatch(p.name))
    if distributed:
        problems.append(
            f"{folder / distributed[0]}: is part of a distributed checkpoint, which transformers "
            f"reads in place of {SINGLE}; save the model with save_pretrained(folder)"
        )
    if problems:
        raise BadInput(problems)


def _missing_reason(path: Path) -> str:
    return "is not a file" if path.exists() else "is a link to a file that is not there"


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Refuses a config that transformers would not read in bounded time or as this program does.

    Raises:
        BadInput: with all settings that are invalid, unreasonably large or not supported.
    """
    raw = read_json_object(path)
    problems = [
        f"{path}: {key}: {value} is more than any model has; use the config.json that belongs to "
        "these weights"
        for key, value in _numbers(raw)
        if value > (MAX_LAYERS if re.search(r"(?<!per_)layer|\[\]$", key) else 2**62)
    ]
    kind = raw.get("model_type")
    if kind is not None and not isinstance(kind, str):
        problems.append(f"{path}: model_type: {kind!r} must be a string such as llama")
    if "transformers_weights" in raw:
        problems.append(
            f"{path}: transformers_weights names other weight files, which is not supported; "
            f"name them {SINGLE} or list them in {INDEX}"
        )
    if problems:
        raise BadInput(problems[:10])
    return raw


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """All integers of a JSON value with their key; nested lists add ``[]`` to the key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        nested = any(isinstance(inner, list) for inner in value)
        for inner in value:
            yield from _numbers(inner, f"{key}[]" if nested and "[]" not in key else key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def find_tensors(folder: Path, name: str) -> dict[str, StoredTensor]:
    """Return all tensors of the weight files that transformers reads, by name.

    As in transformers, ``model.safetensors`` has priority over an index, only the file names of an
    index are used, and the last file with a tensor of a name wins.

    Raises:
        BadInput: if there are no such files, or one is missing or damaged.
    """
    from trainer.model.safetensors_reader import read_header  # imports torch

    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    shards = sorted(set(read_index(folder)))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        others = sorted({path.name for path in folder.glob("*.safetensors")} - set(shards))
        beside = (
            f"; the folder has {', '.join(others[:3])}, which it does not list" if others else ""
        )
        remedy = "copy or download " + ("the index that belongs to it" if others else "them")
        raise BadInput(
            f"{folder / INDEX}: lists missing files: {', '.join(missing[:5])}{beside}; {remedy}"
        )
    if not shards:
        raise BadInput(_no_weights(folder, name))
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors |= read_header(folder / shard)
    return tensors


def _no_weights(folder: Path, name: str) -> str:
    for path in (folder / SINGLE, folder / INDEX):
        if path.exists() or path.is_symlink():
            return f"{path}: {_missing_reason(path)}; copy or download the model again"
    safe = sorted(path.name for path in folder.glob("*.safetensors"))
    other = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if safe:
        return (
            f"base.model: {name!r} has no {SINGLE} and no {INDEX}, but {', '.join(safe[:3])}; "
            "transformers reads neither: rename a single file, or save with save_pretrained(folder)"
        )
    present = "found none"
    if gguf:
        present = f"found {', '.join(gguf[:3])}"
    elif other:
        present = f"found {', '.join(other[:3])}, which can run code when opened"
    return (
        f"base.model: {name!r} has no safetensors weights ({present}); save it with "
        "model.save_pretrained(folder), which writes safetensors"
    )


def read_index(folder: Path) -> list[str]:
    """The weight file of each tensor in the index; empty if there is no index.

    Raises:
        BadInput: if the index is not valid.
    """
    path = folder / INDEX
    if not path.is_file():
        return []
    weight_map = read_json_object(path).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(file, str) and _FILE_NAME.fullmatch(file) for file in files):
        raise BadInput(
            f"{path}: weight_map must map each tensor's name to its file; copy or download it again"
        )
    return files
