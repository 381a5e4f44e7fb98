"""The files of a pretrained model: found, checked and opened before a weight is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from trainer.base import hub
from trainer.base.families import context_length, family_of
from trainer.base.generation_config import read_generation_config
from trainer.config import Base, resolve_path
from trainer.errors import BadInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Enough of a weight file for its header and the first tensors.
HEADER_BYTES = 1 << 20
#: Types of weights that can be loaded, by their name in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class BaseFiles:
    """A model folder that can be loaded.

    Attributes:
        tensors: the file that holds each tensor, by name.
        name: what the run file calls the model.
        generation: settings of the folder for generated text, its end tokens among them.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, Path]
    generation: GenerationConfig

    @property
    def context_length(self) -> int:
        return context_length(self.config)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.tensors.values()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, tokenizer and the headers and sizes of the weight files.

        Found in a moment; ``trainer.base.identity`` has digests of all their content.
        """
        digest = hashlib.sha256()
        for path in sorted({*self.tensors.values(), *self.folder.glob("*.json")}):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(HEADER_BYTES))
        return digest.hexdigest()


def open_base(
    settings: Base, *, download: bool = True, progress: hub.Progress | None = None
) -> BaseFiles:
    """Find the model and read everything but its weights.

    Of a model of the hub, the weights are downloaded last: what is not supported is refused before.

    Args:
        download: what the hub's cache lacks; False takes only what is there.
        progress: told the bytes of the download.

    Raises:
        BadInput: if it is not there, not supported, or not in safetensors.
    """
    folder, from_hub = local_folder(settings), False
    if folder is None:
        folder, from_hub = hub.fetch(settings, hub.SMALL_FILES, download=download), True
    # False, not unset: transformers would ask on the terminal and wait.
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise BadInput(f"base.model: {settings.model!r}: {_why(error)}") from None
    _check_quantization(config, settings.model)
    config = config.get_text_config()
    family_of(config, settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise BadInput(
            f"base.model: {settings.model!r} has no tokenizer that loads: {_why(error)}"
        ) from None
    generation = read_generation_config(folder)
    if from_hub:
        commit = settings.model_copy(update={"revision": folder.name})
        names = sorted(set(_index(folder).values())) or [SINGLE]
        folder = hub.fetch(commit, names, download=download, progress=progress)
    return BaseFiles(
        settings.model,
        folder,
        config,
        tokenizer,
        _tensor_files(folder, settings.model),
        generation,
    )


def _check_quantization(config: PretrainedConfig, name: str) -> None:
    """Of the folders that are quantised already, those in bitsandbytes' 8 bits can be loaded."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found if isinstance(found, dict) else found.to_dict()
    if method.get("quant_method") != "bitsandbytes" or not method.get("load_in_8bit"):
        kind = method.get("quant_method", "an unknown method")
        kind += " in 4 bits" if method.get("load_in_4bit") else ""
        raise BadInput(
            f"base.model: {name!r} is quantised already, with {kind}; give the model that it was "
            "made from, or one in bitsandbytes' 8 bits (promptshard prepare writes one)"
        )
    del config.quantization_config


def local_folder(settings: Base) -> Path | None:
    """The folder that ``base.model`` names; None where it may be a hub id.

    Raises:
        BadInput: if it can be neither.
    """
    folder = resolve_path(settings.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"base.model: {settings.model!r} has no config.json; name the folder that "
                "holds the model's files"
            )
        return folder
    if folder.exists() or settings.model.startswith((".", "/", "~")):
        raise BadInput(f"base.model: {settings.model!r} is not a folder; name a folder or a hub id")
    return None


def _tensor_files(folder: Path, name: str) -> dict[str, Path]:
    if index := _index(folder):
        missing = sorted({f for f in index.values() if not (folder / f).is_file()})
        if missing:
            raise BadInput(
                f"{folder / INDEX}: names files that are not there: {', '.join(missing)}; "
                "download the model again"
            )
        return {tensor: folder / file for tensor, file in index.items()}
    if (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    other = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    found = f"found {', '.join(other)}, which can run code when opened" if other else "found none"
    raise BadInput(
        f"base.model: {name!r} has no safetensors weights ({found}); save it with "
        "model.save_pretrained(folder), which writes safetensors"
    )


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor; nothing where all are in one."""
    if not (folder / INDEX).is_file():
        return {}
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise BadInput(f"{folder / INDEX}: not a safetensors index: {error!r}") from None
    return weight_map


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: is damaged ({_first_line(error)}); download it again") from None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file.

    Attributes:
        type: as the header names it, for example ``BF16``.
        begin: of its first byte, from the start of the file.
    """

    path: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None where weights of this type cannot be loaded."""
        return DTYPES.get(self.type)


def scales_name(name: str) -> str:
    """Where an 8-bit folder keeps the row scales of a tensor: bitsandbytes' ``SCB``."""
    module, _, own = name.rpartition(".")
    return f"{module}.SCB" if own == "weight" else f"{name}_SCB"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file.

    Raises:
        BadInput: if the file is cut short or no safetensors file.
    """
    with _open(path):  # the library checks header and size
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


class SafetensorsReader:
    """Reads tensors, or rows of them, and counts bytes.

    Reads with ``pread`` into memory of its own: of a mapped file every page that was touched would
    stay resident until the file is closed, and network file systems read maps page by page.
    """

    def __init__(self, files: BaseFiles) -> None:
        self.files = files
        self.bytes_read = 0
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def find(self, name: str) -> StoredTensor | None:
        path = self.files.tensors.get(name)
        if path is None:
            return None
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path].get(name)

    def dtype(self, name: str) -> torch.dtype:
        stored = self.find(name)
        assert stored is not None, name
        assert stored.dtype is not None, name
        return stored.dtype

    def is_int8(self, name: str) -> bool:
        stored = self.find(name)
        return stored is not None and stored.dtype == torch.int8

    def problem(self, name: str, shape: Sequence[int]) -> str | None:
        """What is wrong with a tensor, from the file's header alone; None if nothing is."""
        stored = self.find(name)
        if stored is None:
            index = self.files.folder / INDEX
            path = self.files.tensors.get(name, index if index.is_file() else self.files.folder)
            return f"{path}: has no tensor {name!r}; the model is incomplete: download it again"
        if stored.dtype is None:
            return f"{stored.path}: {name!r} is stored as {stored.type}, which is not supported"
        if stored.shape != tuple(shape):
            return (
                f"{stored.path}: {name!r} has shape {list(stored.shape)}, but config.json asks "
                f"for {list(shape)}"
            )
        return None

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, in the type it is stored in.

        Raises:
            BadInput: if it cannot be read or is not finite.
        """
        stored = self.find(name)
        assert stored is not None, name
        return self.read_flat(name, 0, math.prod(stored.shape)).view(stored.shape)

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a tensor as if it had one dimension.

        Rows follow each other in the file, so rows a to b of [N, K] are elements a * K to b * K.

        Raises:
            BadInput: if they cannot be read or are not finite.
        """
        dtype = self.dtype(name)
        values = self.read_bytes(name, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)
        if values.is_floating_point() and not torch.isfinite(values).all():
            path = self.files.tensors[name]
            raise BadInput(f"{path}: {name!r} holds NaN or infinite weights")
        return values

    def read_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Bytes ``start`` to ``stop`` of a tensor, whatever its type.

        Raises:
            BadInput: if they cannot be read.
        """
        stored = self.find(name)
        assert stored is not None, name
        raw = torch.empty(stop - start, dtype=torch.uint8)
        self._pread(stored, name, raw, stored.begin + start)
        return raw

    def _pread(self, stored: StoredTensor, name: str, raw: torch.Tensor, offset: int) -> None:
        view, done = raw.numpy().data, 0
        try:
            if stored.path not in self._descriptors:
                self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
            while done < len(view):
                count = os.preadv(self._descriptors[stored.path], [view[done:]], offset + done)
                if count == 0:
                    raise OSError("the file ends here")
                done += count
        except OSError as error:
            raise BadInput(f"{stored.path}: cannot read {name!r}: {error}") from None
        self.bytes_read += done


def _why(error: Exception) -> str:
    """Why transformers does not open a folder."""
    if "custom code" in str(error):
        return "it needs code of its own, which is never run; give a model that transformers knows"
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())  # a setting, and on its next line what is wrong
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
