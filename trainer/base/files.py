"""The files of a pretrained model: found, checked and opened before a weight is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from trainer.base.families import context_length, family_of
from trainer.config import Base, resolve_path
from trainer.errors import BadInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Enough of a weight file for its header and the first tensors.
HEADER_BYTES = 1 << 20
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class BaseFiles:
    """A model folder that can be loaded.

    Attributes:
        tensors: the file that holds each tensor, by name.
        name: what the run file calls the model.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, Path]

    @property
    def context_length(self) -> int:
        return context_length(self.config)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.tensors.values()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config, tokenizer and the headers and sizes of the weight files."""
        digest = hashlib.sha256()
        for path in sorted({*self.tensors.values(), *self.folder.glob("*.json")}):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(HEADER_BYTES))
        return digest.hexdigest()


def open_base(settings: Base) -> BaseFiles:
    """Find the model and read everything but its weights.

    Raises:
        BadInput: if it is not there, not supported, or not in safetensors.
    """
    folder = _folder(settings)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"base.model: {settings.model!r}: {_first_line(error)}") from None
    config = config.get_text_config()
    family_of(config, settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"base.model: {settings.model!r} has no tokenizer that loads: {_first_line(error)}"
        ) from None
    return BaseFiles(
        settings.model, folder, config, tokenizer, _tensor_files(folder, settings.model)
    )


def _folder(settings: Base) -> Path:
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # One download per node: the ranks of a node share the cache, and its lock makes them wait.
        return Path(
            snapshot_download(settings.model, revision=settings.revision, allow_patterns=HUB_FILES)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"base.model: {settings.model!r} is neither a folder here ({os.getcwd()}) nor a model "
            f"that the hub gives: {_first_line(error)}"
        ) from None


def _tensor_files(folder: Path, name: str) -> dict[str, Path]:
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise BadInput(f"{folder / INDEX}: not a safetensors index: {error!r}") from None
        missing = sorted({f for f in weight_map.values() if not (folder / f).is_file()})
        if missing:
            raise BadInput(
                f"{folder / INDEX}: names files that are not there: {', '.join(missing)}; "
                "download the model again"
            )
        return {tensor: folder / file for tensor, file in weight_map.items()}
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


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise BadInput(f"{path}: is damaged ({_first_line(error)}); download it again") from None


class SafetensorsReader:
    """Reads tensors by name, keeps files open, counts bytes, and refuses what cannot be right."""

    def __init__(self, files: BaseFiles) -> None:
        self.files = files
        self.bytes_read = 0
        self._stack = ExitStack()
        self._open_files: dict[Path, Any] = {}
        self._known: dict[Path, set[str]] = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open_files.clear()
        self._stack.close()

    def problem(self, name: str, shape: torch.Size) -> str | None:
        """What is wrong with a tensor, from the file's header alone; None if nothing is."""
        path = self.files.tensors.get(name)
        if path is None or name not in self._keys(path):
            return f"{path or self.files.folder}: has no tensor {name!r}; the model is incomplete"
        found = self._file(path).get_slice(name).get_shape()
        if found != list(shape):
            return f"{path}: {name!r} has shape {found}, but config.json asks for {list(shape)}"
        return None

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name``, in the type it is stored in.

        Raises:
            BadInput: if it cannot be read or is not finite.
        """
        path = self.files.tensors[name]
        try:
            tensor: torch.Tensor = self._file(path).get_tensor(name)
        except SafetensorError as error:
            raise BadInput(f"{path}: cannot read {name!r}: {_first_line(error)}") from None
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadInput(f"{path}: {name!r} holds NaN or infinite weights")
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _file(self, path: Path) -> Any:
        if path not in self._open_files:
            self._open_files[path] = self._stack.enter_context(_open(path))
        return self._open_files[path]

    def _keys(self, path: Path) -> set[str]:
        if path not in self._known:
            self._known[path] = set(self._file(path).keys())
        return self._known[path]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
