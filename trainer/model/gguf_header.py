"""Read the header of a GGUF file, and refuse what cannot be read. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.runtime.errors import BadInput

#: Architectures that are compared with transformers, by their name in a GGUF file.
ARCHITECTURES = (
    *("gemma2", "gemma3", "llama", "nemotron", "phi3", "qwen2", "qwen3", "qwen3moe", "stablelm"),
    "starcoder2",
)
#: Types without blocks, by their name in a safetensors header.
FLOATS = ("F32", "F16", "BF16")
#: Fields of a model card, by their name in a GGUF file.
CARD_FIELDS = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}
#: End of the name of a part, as ``llama-gguf-split`` writes it.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufHeader:
    """Architecture and tensors of a GGUF file.

    Attributes:
        tensors: descriptions from ``GGUFReader``, each with the file that holds the tensor.
        card: those of the fields ``CARD_FIELDS`` that the file has, by the name in a model card.
    """

    architecture: str
    tensors: tuple[tuple[Path, Any], ...]
    card: dict[str, str]


def read_gguf_header(path: Path, name: str) -> GgufHeader:
    """Read the header of a GGUF file, and of the other parts of a model in several files.

    Raises:
        BadInput: if a file is damaged or missing, or its architecture or a type is not supported.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BadInput(
            f"base.model: {name!r} is a GGUF file, which requires the package gguf; install it "
            "(pip install 'promptshard[gguf]')"
        ) from None
    tensors: list[tuple[Path, Any]] = []
    architecture, card = "", dict[str, str]()
    for part in _parts(path, name):
        try:
            with plain_arrays():
                reader = GGUFReader(part)
            if part == path:
                architecture = str(reader.fields["general.architecture"].contents())
                split = reader.fields.get("split.count")
                count = int(split.contents()) if split else 1
                stated = ((name, reader.fields.get(key)) for key, name in CARD_FIELDS.items())
                card = {name: str(value.contents()) for name, value in stated if value}
        except Exception as error:
            text = " ".join(str(error).split())
            raise BadInput(
                f"base.model: {str(part)!r} is not a GGUF file that can be read: {text[:300]} "
                f"({type(error).__name__}); copy or download it again"
            ) from None
        if part == path:
            _check_architecture(architecture, count, path, name)
        tensors += ((part, tensor) for tensor in reader.tensors)
    unread = next((pair for pair in tensors if not _is_readable(pair[1])), None)
    if unread:
        raise BadInput(
            f"{unread[0]}: {unread[1].name!r} is stored as {unread[1].tensor_type.name}, which "
            "cannot be read; use a GGUF file of type Q4_0 to Q8_0 or a K-quant"
        )
    return GgufHeader(architecture, tuple(tensors), card)


def _parts(path: Path, name: str) -> list[Path]:
    """The files of a model: one, or all parts if the name is that of a part."""
    match = _PART.search(path.name)
    if match is None:
        return [path]
    parts = [
        path.with_name(f"{path.name[: match.start()]}-{number:05d}-of-{match[2]}.gguf")
        for number in range(1, int(match[2]) + 1)
    ]
    if path != parts[0]:
        raise BadInput(f"base.model: {name!r} is a part of a model; name its first: {parts[0]}")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise BadInput(
            f"base.model: {name!r} is one of {len(parts)} parts of a model, of which "
            f"{', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} missing; copy or "
            "download them to the same folder"
        )
    return parts


def _check_architecture(architecture: str, count: int, path: Path, name: str) -> None:
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"base.model: {name!r} is a GGUF file of architecture {architecture!r}, which is not "
            f"supported (supported: {', '.join(ARCHITECTURES)}); {_remedy(path)}"
        )
    match = _PART.search(path.name)
    named = int(match[2]) if match else 1
    # transformers derives settings of StableLM from the names of all tensors in one file.
    if count != named or (count > 1 and architecture == "stablelm"):
        raise BadInput(
            f"base.model: {name!r} is one of {count} parts of a model, which cannot be read in "
            "parts; merge them first (llama-gguf-split --merge)"
        )


def _is_readable(tensor: Any) -> bool:
    """Whether ``gguf`` can dequantize the type of a tensor."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    if kind.name in FLOATS:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except (NotImplementedError, ValueError, KeyError):
        return False
    return True


@contextmanager
def plain_arrays() -> Iterator[None]:
    """Let ``GGUFReader`` read from a plain array: slices of ``numpy.memmap`` take 4 times as long.

    A vocabulary has several hundred thousand strings, and transformers reads the file twice.
    """
    import numpy as np
    from gguf import GGUFReader

    def hold(reader: Any, mapped: Any) -> None:
        reader._plain = mapped.view(np.ndarray)

    GGUFReader.data = property(lambda reader: reader._plain, hold)
    try:
        yield
    finally:
        del GGUFReader.data


def _remedy(path: Path) -> str:
    """Describe how to convert a GGUF file to a model folder."""
    load = f"from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}"
    return (
        "if transformers supports it, convert it once: "
        f"AutoModelForCausalLM.{load}, quantization_config=GgufConfig(dequantize=True))"
        f".save_pretrained(NEW_FOLDER, save_original_format=False), AutoTokenizer.{load})"
        ".save_pretrained(NEW_FOLDER)"
    )
