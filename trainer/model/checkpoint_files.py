"""Find, check and open the files of a pretrained model before any weight is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from trainer.config import Base, resolve_path
from trainer.model import hub
from trainer.model.chat_template_file import read_chat_template
from trainer.model.families import check_model_type, context_length, family_of
from trainer.model.generation_config import end_ids, read_generation_config
from trainer.model.gguf_file import read_gguf
from trainer.model.model_folder import (
    SINGLE,
    SMALL_FILES,
    check_folder,
    find_tensors,
    read_config,
    read_index,
)
from trainer.model.quantized_weights import accept_quantization, combine_tensors
from trainer.model.safetensors_reader import StoredTensor
from trainer.model.transformers_model import library_errors
from trainer.model.weight_mapping import WeightMapping, map_weights
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

#: Bytes at the start of a weight file that contain the header and the first tensors.
HEADER_BYTES = 1 << 20
#: JSON files of a tokenizer, and their maximum size.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
TOKENIZER_BYTES = 1 << 28
GGUF = ".gguf"


@dataclass(frozen=True)
class BaseFiles:
    """A model folder or GGUF file that can be loaded.

    Attributes:
        name: ``base.model``.
        folder: or the GGUF file, which contains config and tokenizer.
        config: of the text model; ``tie_word_embeddings`` is corrected to the stored weights.
        tensors: all tensors of the weight files that transformers reads, by name.
        generation: the folder's generation config, with the end tokens.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, StoredTensor]
    parameters: WeightMapping
    generation: GenerationConfig

    @property
    def context_length(self) -> int:
        return context_length(self.config)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens at which the base's generation stops."""
        return end_ids(self.generation)

    @cached_property
    def weight_files(self) -> list[Path]:
        files = {path for stored in self.tensors.values() for path in stored.files}
        return sorted(files | ({self.folder} if self.folder.suffix == GGUF else set()))

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weight_files)

    def small_files(self, *patterns: str) -> list[Path]:
        """Files of config and tokenizer; none if they are in a GGUF file."""
        return sorted(path for pattern in patterns for path in self.folder.glob(pattern))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, tokenizer, and the headers and sizes of the weight files.

        Fast; ``trainer.model.fingerprint`` hashes the complete content.
        """
        digest = hashlib.sha256()
        for path in sorted({*self.weight_files, *self.small_files("*.json")}):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(HEADER_BYTES))
        return digest.hexdigest()


@dataclass(frozen=True)
class BaseTokenizer:
    """What determines the tokens of rows; ``config`` is that of the text model."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    generation: GenerationConfig

    @property
    def context_length(self) -> int:
        return context_length(self.config)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens at which the base's generation stops."""
        return end_ids(self.generation)


def open_base(
    settings: Base, *, download: bool = True, progress: hub.Progress | None = None
) -> BaseFiles:
    """Find the model and read everything except its weights.

    Weights of a hub model are downloaded last, after its other files were checked.

    Args:
        download: download files that the hub's cache lacks; False uses only the cache.

    Raises:
        BadInput: if the model is missing, unsupported, not in safetensors, damaged or incomplete.
    """
    name, folder = settings.model, local_path(settings)
    if folder is not None and folder.suffix == GGUF:
        return _open_gguf(folder, settings)
    from_hub = folder is None
    folder = folder or hub.fetch(settings, SMALL_FILES, download=download)
    config, quantization, tokenizer, generation = _read_small_files(folder, settings)
    text = config.get_text_config()
    if from_hub:
        commit = settings.model_copy(update={"revision": folder.name})
        folder = hub.fetch(commit, [SINGLE], download=download, progress=progress)
        if not (folder / SINGLE).is_file() and (shards := sorted(set(read_index(folder)))):
            folder = hub.fetch(commit, shards, download=download, progress=progress)
    tensors = combine_tensors(find_tensors(folder, name), quantization)
    parameters = map_weights(config, tensors, name)
    text.tie_word_embeddings = parameters.tied
    return BaseFiles(name, folder, text, tokenizer, tensors, parameters, generation)


def open_tokenizer(settings: Base) -> BaseTokenizer:
    """Find the model and read what determines the tokens of rows, but no weights.

    Raises:
        BadInput: as ``open_base``, except for problems of weights.
    """
    folder = local_path(settings)
    if folder is not None and folder.suffix == GGUF:
        files = _open_gguf(folder, settings)
        return BaseTokenizer(folder, files.tokenizer, files.config, files.generation)
    folder = folder or hub.fetch(settings, SMALL_FILES, download=True)
    config, _, tokenizer, generation = _read_small_files(folder, settings)
    return BaseTokenizer(folder, tokenizer, config.get_text_config(), generation)


def _read_small_files(
    folder: Path, settings: Base
) -> tuple[PretrainedConfig, dict[str, Any] | None, PreTrainedTokenizerBase, GenerationConfig]:
    """Read config, quantization config, tokenizer and generation config of a model folder."""
    name = settings.model
    check_folder(folder, name)
    config, quantization = _read_config(folder, name)
    family_of(config.get_text_config(), name)
    tokenizer = _read_tokenizer(folder, name)
    _set_chat_template(tokenizer, settings)
    return config, quantization, tokenizer, read_generation_config(folder)


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, settings: Base) -> None:
    if settings.chat_template is not None:
        tokenizer.chat_template = read_chat_template(settings.chat_template)


def _open_gguf(path: Path, settings: Base) -> BaseFiles:
    name = settings.model
    model = read_gguf(path, name)
    _set_chat_template(model.tokenizer, settings)
    family_of(model.config, name)
    accept_quantization(model.config, name)
    generation = GenerationConfig.from_model_config(model.config)
    parameters = map_weights(model.config, model.tensors, name)
    model.config.tie_word_embeddings = parameters.tied
    return BaseFiles(
        name, path, model.config, model.tokenizer, model.tensors, parameters, generation
    )


def local_path(settings: Base) -> Path | None:
    """The folder or GGUF file that ``base.model`` names; None if it may be a hub id.

    Raises:
        BadInput: if ``base.model`` can be neither.
    """
    path = resolve_path(settings.model)
    if path.is_dir() or (path.is_file() and path.suffix == GGUF):
        return path
    if path.exists() or settings.model.startswith((".", "/", "~")):
        problem = (
            f"base.model: {settings.model!r} is not a folder; use a folder, a GGUF file or a hub id"
        )
        if path.is_file() and path.suffix in (".safetensors", ".json"):
            problem = (
                f"base.model: {settings.model!r} is a file; use its folder, {str(path.parent)!r}"
            )
        raise BadInput(problem)
    return None


def portable(settings: Base) -> Base:
    """Replace the paths by absolute ones, which are valid in any working directory."""
    template = settings.chat_template
    absolute = None if template is None else str(resolve_path(template).absolute())
    return settings.model_copy(update={"model": portable_name(settings), "chat_template": absolute})


def portable_name(settings: Base) -> str:
    """Absolute path of the folder or file, or the hub id: valid in any working directory."""
    path = local_path(settings)
    return settings.model if path is None else str(path.resolve())


def _read_config(folder: Path, name: str) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """Read the config of a text model or its multimodal container, and its quantization."""
    check_model_type(read_config(folder / "config.json"), name)
    with library_errors(f"base.model: config.json of {name!r}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        if not isinstance(text, PretrainedConfig):
            raise TypeError(f"the config of its text model is {text!r}")
    quantization = accept_quantization(config, name)
    return config, accept_quantization(text, name) or quantization


def _read_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        with library_errors(f"base.model: the tokenizer of {name!r}"):
            # Without ``trust_remote_code``, transformers prompts on the terminal and waits.
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False
            )
            tokenizer("A text.")
    except BadInput:
        for file in TOKENIZER_FILES:  # the error of a damaged file is more specific
            if (folder / file).is_file():
                read_json_object(folder / file, max_bytes=TOKENIZER_BYTES)
        raise
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or isinstance(longest, bool):
        raise BadInput(
            f"{folder / 'tokenizer_config.json'}: model_max_length: {longest!r} is not a number; "
            "set the maximum number of tokens of the model, or remove the line"
        )
    return tokenizer
