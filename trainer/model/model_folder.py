"""The files of a model folder: which of them transformers reads, and whether they are damaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from trainer.model.safetensors_reader import StoredTensor, read_header
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: What a model has beside its weights: config, index of the weight files, tokenizer.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
#: Files that transformers takes for a checkpoint of torch.distributed, before all others.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_FILE_NAME = re.compile(r"[^\0]{1,255}")
#: More layers than any model has: lists of that length are made before a weight is looked at.
MOST_LAYERS = 100_000
#: Methods whose weights transformers dequantizes while it loads them, and its config for that.
_DEQUANTIZED_BY = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder with files that transformers would read and we do not.

    Raises:
        BadInput: with every file that is in the way.
    """
    if not (folder / "config.json").is_file():
        if gguf := sorted(folder.glob("*.gguf")):
            raise BadInput(f"base.model: {name!r} holds a GGUF file, {gguf_remedy(gguf[0])}")
        raise BadInput(
            f"base.model: {name!r} has no config.json; name the folder that holds the model's "
            "config.json and safetensors files"
        )
    problems = [
        f"{path}: {_no_file(path)}; copy or download the model again"
        for pattern in SMALL_FILES
        for path in sorted(folder.glob(pattern))
        if not path.is_file()
    ]
    if (folder / "adapter_config.json").is_file():
        problems.append(
            f"{folder / 'adapter_config.json'}: transformers would add this adapter to the model; "
            "merge it first (PEFT: model.merge_and_unload().save_pretrained(FOLDER)), or move it "
            "to a folder of its own"
        )
    distributed = sorted(p.name for p in folder.iterdir() if _DISTRIBUTED.fullmatch(p.name))
    if distributed:
        problems.append(
            f"{folder / distributed[0]}: is part of a distributed checkpoint, which transformers "
            f"reads in place of {SINGLE}; save the model with save_pretrained(folder)"
        )
    if problems:
        raise BadInput(problems)


def gguf_remedy(path: Path) -> str:
    """Say how to make a folder of a GGUF file."""
    load = f"from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}"
    return (
        "which cannot be trained on as it is; convert it once with transformers (needs the package "
        f"gguf): AutoModelForCausalLM.{load}, quantization_config=GgufConfig(dequantize=True))"
        f".save_pretrained(NEW_FOLDER, save_original_format=False), AutoTokenizer.{load})"
        ".save_pretrained(NEW_FOLDER); then name NEW_FOLDER"
    )


def _no_file(path: Path) -> str:
    return "is not a file" if path.exists() else "is a link to a file that is not there"


def check_config(path: Path) -> None:
    """Check what would stop transformers from reading a config in bounded time.

    Raises:
        BadInput: if it is no JSON object, or its numbers are out of all bounds.
    """
    raw = read_json_object(path)
    problems = [
        f"{path}: {key}: {value} is more than any model has; give the config.json of these weights"
        for key, value in _numbers(raw)
        if value > (MOST_LAYERS if "layer" in key or key.endswith("[]") else 2**62)
    ]
    kind = raw.get("model_type")
    if kind is not None and not isinstance(kind, str):
        problems.append(f"{path}: model_type: {kind!r} is no text; give the model's, such as llama")
    if "transformers_weights" in raw:
        problems.append(
            f"{path}: transformers_weights names other weight files, which is not supported; "
            f"name them {SINGLE} or list them in {INDEX}"
        )
    if problems:
        raise BadInput(problems[:10])


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """All integers of a JSON value by their key; ``[]`` follows the key of lists within lists."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        nested = any(isinstance(inner, list) for inner in value)
        for inner in value:
            yield from _numbers(inner, f"{key}[]" if nested and "[]" not in key else key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def check_quantization(config: PretrainedConfig, name: str) -> None:
    """Remove the quantization settings of a config that bitsandbytes' 8-bit weights have.

    Raises:
        BadInput: if the weights are stored in another format; says how to convert them.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found if isinstance(found, dict) else found.to_dict()
    kind = str(method.get("quant_method", "an unknown format"))
    if kind == "bitsandbytes" and method.get("load_in_8bit"):
        del config.quantization_config
        return
    kind += " (4 bits)" if method.get("load_in_4bit") else ""
    load = f"AutoModelForCausalLM.from_pretrained({name!r}"
    # In the original format transformers may write names that it does not read back.
    save = (
        "save_pretrained(NEW_FOLDER, save_original_format=False), AutoTokenizer.from_pretrained("
        f"{name!r}).save_pretrained(NEW_FOLDER)"
    )
    remedy = "give a release of the model in 16 bits"
    if kind in _DEQUANTIZED_BY:
        dequantized = f"quantization_config={_DEQUANTIZED_BY[kind]}(dequantize=True)"
        remedy = f"write it in 16 bits once, in transformers: {load}, {dequantized}).{save}"
    elif kind == "bitsandbytes (4 bits)":
        remedy += f", or write it in 16 bits once, in transformers: {load}).dequantize().{save}"
    raise BadInput(f"base.model: the weights of {name!r} are stored in {kind}; {remedy}")


def find_tensors(folder: Path, name: str) -> dict[str, StoredTensor]:
    """All tensors of the weight files that transformers reads, by name.

    As there: ``model.safetensors`` comes before an index; of an index only the file names count,
    and of a tensor that several files hold the last file's.

    Raises:
        BadInput: if there are no such files, or one is damaged.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    shards = sorted(set(read_index(folder)))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        others = sorted({path.name for path in folder.glob("*.safetensors")} - set(shards))
        beside = (
            f"; the folder has {', '.join(others[:3])}, which it does not name" if others else ""
        )
        remedy = "copy or download " + ("the index that belongs to it" if others else "them")
        raise BadInput(
            f"{folder / INDEX}: names files that are not there: {', '.join(missing[:5])}{beside}; "
            f"{remedy}"
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
            return f"{path}: {_no_file(path)}; copy or download the model again"
    safe = sorted(path.name for path in folder.glob("*.safetensors"))
    other = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if safe:
        return (
            f"base.model: {name!r} has no {SINGLE} and no {INDEX}, but {', '.join(safe[:3])}; "
            "transformers reads neither: rename a single file, or save with save_pretrained(folder)"
        )
    found = (
        f"found {', '.join(other[:3])}, which can run code when opened" if other else "found none"
    )
    found = f"found {', '.join(gguf[:3])}" if gguf else found
    return (
        f"base.model: {name!r} has no safetensors weights ({found}); save it with "
        "model.save_pretrained(folder), which writes safetensors"
    )


def read_index(folder: Path) -> list[str]:
    """The weight file of each tensor that the index names; nothing where there is no index.

    Raises:
        BadInput: if it is no index.
    """
    path = folder / INDEX
    if not path.is_file():
        return []
    weight_map = read_json_object(path).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(file, str) and _FILE_NAME.fullmatch(file) for file in files):
        raise BadInput(
            f"{path}: weight_map must give the file of each tensor by name; copy or download it "
            "again"
        )
    return files
