"""Find, check and open the files of a pretrained model before any weight is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import GenerationConfig

from trainer.config import Base, resolve_path
from trainer.model import hub
from trainer.model.base_tokenizer import (
    CARD,
    GGUF,
    BaseTokenizer,
    local_path,
    read_small_files,
    set_chat_template,
)
from trainer.model.families import family_of
from trainer.model.gguf_file import read_gguf
from trainer.model.model_folder import (
    SINGLE,
    SMALL_FILES,
    find_tensors,
    read_index,
)
from trainer.model.quantization_config import accept_quantization
from trainer.model.quantized_weights import combine_tensors
from trainer.model.safetensors_reader import StoredTensor
from trainer.model.weight_mapping import WeightMapping, map_weights

#: Bytes at the start of a weight file that contain the header and the first tensors.
HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class BaseFiles(BaseTokenizer):
    """A model folder or GGUF file that can be loaded.

    ``config.tie_word_embeddings`` is corrected to the stored weights.

    Attributes:
        name: ``base.model``.
        tensors: all tensors of the weight files that transformers reads, by name.
    """

    name: str
    tensors: dict[str, StoredTensor]
    parameters: WeightMapping

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
    folder = folder or hub.fetch(settings, [*SMALL_FILES, CARD], download=download)
    config, quantization, tokenizer, generation = read_small_files(folder, settings)
    text = config.get_text_config()
    if from_hub:
        commit = settings.model_copy(update={"revision": folder.name})
        folder = hub.fetch(commit, [SINGLE], download=download, progress=progress)
        if not (folder / SINGLE).is_file() and (shards := sorted(set(read_index(folder)))):
            folder = hub.fetch(commit, shards, download=download, progress=progress)
    tensors = combine_tensors(find_tensors(folder, name), quantization)
    parameters = map_weights(config, tensors, name)
    text.tie_word_embeddings = parameters.tied
    return BaseFiles(folder, tokenizer, text, generation, name, tensors, parameters)


def _open_gguf(path: Path, settings: Base) -> BaseFiles:
    name = settings.model
    model = read_gguf(path, name)
    set_chat_template(model.tokenizer, settings)
    family_of(model.config, name)
    accept_quantization(model.config, name)
    generation = GenerationConfig.from_model_config(model.config)
    parameters = map_weights(model.config, model.tensors, name)
    model.config.tie_word_embeddings = parameters.tied
    return BaseFiles(
        path, model.tokenizer, model.config, generation, name, model.tensors, parameters
    )


def portable(settings: Base) -> Base:
    """Replace the paths by absolute ones, which are valid in any working directory."""
    template = settings.chat_template
    absolute = None if template is None else str(resolve_path(template).absolute())
    return settings.model_copy(update={"model": portable_name(settings), "chat_template": absolute})


def portable_name(settings: Base) -> str:
    """Absolute path of the folder or file, or the hub id: valid in any working directory."""
    path = local_path(settings)
    return settings.model if path is None else str(path.resolve())
