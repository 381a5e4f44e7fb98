"""Find the base's folder and open its config and tokenizer, without torch."""

from __future__ import annotations

from dataclasses import dataclass
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
from trainer.model.library_errors import library_errors
from trainer.model.model_folder import SMALL_FILES, check_folder, read_config
from trainer.model.quantization_config import accept_quantization
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

#: JSON files of a tokenizer, and their maximum size.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
TOKENIZER_BYTES = 1 << 28
GGUF = ".gguf"
#: Model card of a folder; it names the license.
CARD = "README.md"


@dataclass(frozen=True)
class BaseTokenizer:
    """What determines the tokens of rows.

    Attributes:
        folder: or the GGUF file, which contains config and tokenizer.
        config: of the text model.
        generation: the folder's generation config, with the end tokens.
    """

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


def open_tokenizer(settings: Base) -> BaseTokenizer:
    """Find the model and read what determines the tokens of rows, but no weights.

    Raises:
        BadInput: as ``open_base``, except for problems of weights.
    """
    folder = local_path(settings)
    if folder is not None and folder.suffix == GGUF:
        from trainer.model.gguf_file import read_gguf  # imports torch

        model = read_gguf(folder, settings.model)
        set_chat_template(model.tokenizer, settings)
        family_of(model.config, settings.model)
        generation = GenerationConfig.from_model_config(model.config)
        return BaseTokenizer(folder, model.tokenizer, model.config, generation)
    folder = folder or hub.fetch(settings, [*SMALL_FILES, CARD], download=True)
    config, _, tokenizer, generation = read_small_files(folder, settings)
    return BaseTokenizer(folder, tokenizer, config.get_text_config(), generation)


def is_downloaded(settings: Base) -> bool:
    """Whether the tokenizer of the base is on this machine: a folder, a file, or in the cache."""
    if local_path(settings) is not None:
        return True
    try:
        hub.fetch(settings, SMALL_FILES, download=False)
    except BadInput:
        return False
    return True


def read_small_files(
    folder: Path, settings: Base
) -> tuple[PretrainedConfig, dict[str, Any] | None, PreTrainedTokenizerBase, GenerationConfig]:
    """Read config, quantization config, tokenizer and generation config of a model folder."""
    name = settings.model
    check_folder(folder, name)
    config, quantization = read_model_config(folder, name)
    family_of(config.get_text_config(), name)
    tokenizer = _read_tokenizer(folder, name)
    set_chat_template(tokenizer, settings)
    return config, quantization, tokenizer, read_generation_config(folder)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, settings: Base) -> None:
    if settings.chat_template is not None:
        tokenizer.chat_template = read_chat_template(settings.chat_template)


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


def read_model_config(folder: Path, name: str) -> tuple[PretrainedConfig, dict[str, Any] | None]:
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
