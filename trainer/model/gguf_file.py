"""Read a model from a GGUF file: config and tokenizer as transformers derives them, and weights.

Weights are dequantized by rows with the ``gguf`` library, as transformers does for whole tensors
(``transformers.modeling_gguf_pytorch_utils``).

Shape letters: E experts, N output features, K input features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from trainer.model.safetensors_reader import ReadBytes, StoredTensor
from trainer.model.transformers_model import (
    build_transformers_model,
    library_errors,
    limit_parameters,
)
from trainer.runtime.errors import BadInput

#: Architectures that are compared with transformers, by their name in a GGUF file.
ARCHITECTURES = (
    *("gemma2", "gemma3", "llama", "nemotron", "phi3", "qwen2", "qwen3", "qwen3moe", "stablelm"),
    "starcoder2",
)
#: Architectures whose files hold the weight of a norm plus one.
_NORM_PLUS_ONE = ("gemma2", "gemma3", "nemotron")
#: Types without blocks, by their name in a safetensors header.
_FLOATS = ("F32", "F16", "BF16")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up)_exps\.weight")


@dataclass(frozen=True)
class GgufBlocks:
    """Rows of a GGUF tensor [..., N, K] or [N].

    Attributes:
        kind: name of its type, for example ``Q4_K``.
        heads: number of heads whose rows are in the order of llama.cpp's rotary embedding: pairs
            of rows of the first and second half of a head. 0: rows are in order.
        offset: is subtracted from every value.
    """

    stored: StoredTensor
    kind: str
    heads: int = 0
    offset: float = 0.0

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.stored,)

    def rows(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        shape = self.stored.shape
        num_rows = int(np.prod(shape[:-1])) if len(shape) > 1 else shape[0]
        size = self.stored.num_bytes // num_rows
        wanted = self._places(np.arange(start, stop), num_rows)
        first, last = int(wanted.min()), int(wanted.max()) + 1
        raw = read(self.stored, first * size, last * size).numpy().reshape(-1, size)
        if self.heads:
            raw = raw[wanted - first]
        values = torch.from_numpy(dequantize(raw, GGMLQuantizationType[self.kind]))
        if self.offset:
            values -= self.offset
        return values if len(shape) > 1 else values.flatten()

    def _places(self, rows: np.ndarray, num_rows: int) -> np.ndarray:
        """The rows in the file that hold rows of the parameter."""
        if not self.heads:
            return rows
        size = num_rows // self.heads
        head, row = rows // size, rows % size
        half, pair = row // (size // 2), row % (size // 2)
        return head * size + 2 * pair + half


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file's config, tokenizer, and tensors by the names of transformers' parameters."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path, name: str) -> GgufModel:
    """Read everything except the values of a GGUF file's tensors.

    Raises:
        BadInput: if the file is damaged, or its architecture or a type is not supported.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BadInput(
            f"base.model: {name!r} is a GGUF file, which requires the package gguf; install it "
            "(pip install 'promptshard[gguf]')"
        ) from None
    with library_errors(f"base.model: {name!r}"), _plain_arrays():
        reader = GGUFReader(path)
        fields = dict(reader.fields)
        architecture = str(fields["general.architecture"].contents())
        split = fields.get("split.count")
        parts = int(split.contents()) if split else 1
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"base.model: {name!r} is a GGUF file of architecture {architecture!r}, which is not "
            f"supported (supported: {', '.join(ARCHITECTURES)}); {_remedy(path)}"
        )
    if parts > 1:
        raise BadInput(
            f"base.model: {name!r} is one of {parts} parts of a model; merge them first "
            "(llama-gguf-split --merge)"
        )
    with library_errors(f"base.model: {name!r}"), _plain_arrays():
        options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, **options)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, **options)
        tokenizer("A text.")
    stored = {tensor.name: _stored(path, tensor) for tensor in reader.tensors}
    tensors = _rename(stored, config, architecture, name)
    return GgufModel(config, tokenizer, tensors)


@contextmanager
def _plain_arrays() -> Iterator[None]:
    """Let ``GGUFReader`` read from a plain array: slices of ``numpy.memmap`` take 4 times as long.

    A vocabulary has several hundred thousand strings, and transformers reads the file twice.
    """
    from gguf import GGUFReader

    def hold(reader: Any, mapped: np.ndarray) -> None:
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


def _stored(path: Path, tensor: Any) -> StoredTensor:
    """A tensor of the file, in blocks unless it is of a float type."""
    kind = tensor.tensor_type.name
    shape = tuple(int(size) for size in reversed(tensor.shape))
    stored = StoredTensor(path, kind, shape, int(tensor.data_offset), int(tensor.n_bytes))
    if kind in _FLOATS:
        return stored
    encoding = GgufBlocks(stored, kind)
    try:
        encoding.rows(lambda _, start, stop: torch.zeros(stop - start, dtype=torch.uint8), 0, 1)
    except (NotImplementedError, ValueError, KeyError):
        raise BadInput(
            f"{path}: {tensor.name!r} is stored as {kind}, which cannot be read; use a GGUF file "
            "of type Q4_0 to Q8_0 or a K-quant"
        ) from None
    return replace(stored, encoding=encoding)


def _rename(
    stored: Mapping[str, StoredTensor], config: PretrainedConfig, architecture: str, name: str
) -> dict[str, StoredTensor]:
    """Name tensors like transformers' parameters, and undo llama.cpp's changes of their values."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    with limit_parameters(len(stored), name), library_errors(f"base.model: {name!r}"):
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        model = build_transformers_model(config, name)
        names = get_gguf_hf_weights_map(model, processor)
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        new = names.get(key) or names.get(key.removesuffix(".weight"), key)
        if match := _EXPERTS.fullmatch(key):
            tensors |= _experts(tensor, f"{new.rpartition('.')[0]}", f"{match[1]}_proj")
        else:
            tensors[new] = _restored(tensor, key, config, architecture)
    return tensors


def _experts(stacked: StoredTensor, prefix: str, projection: str) -> dict[str, StoredTensor]:
    """The matrices of a stack [E, N, K] under the names of a checkpoint with one per expert."""
    experts = stacked.shape[0]
    size = stacked.num_bytes // experts
    matrices = {}
    for expert in range(experts):
        plain = replace(
            stacked,
            shape=stacked.shape[1:],
            begin=stacked.begin + expert * size,
            num_bytes=size,
            encoding=None,
        )
        encoding = GgufBlocks(plain, stacked.type) if stacked.encoding else None
        matrices[f"{prefix}.{expert}.{projection}.weight"] = replace(plain, encoding=encoding)
    return matrices


def _restored(
    tensor: StoredTensor, key: str, config: PretrainedConfig, architecture: str
) -> StoredTensor:
    """Undo the permutation of Llama's queries and keys, and the offset of norms."""
    heads, offset = 0, 0.0
    if architecture == "llama" and ".attn_q." in key:
        heads = config.num_attention_heads
    elif architecture == "llama" and ".attn_k." in key:
        heads = config.num_key_value_heads
    elif architecture in _NORM_PLUS_ONE and key.endswith("norm.weight"):
        offset = 1.0
    if heads and tensor.shape[0] % (2 * heads):
        raise BadInput(
            f"{tensor.path}: {key!r} has {tensor.shape[0]} rows, which {heads} heads do not divide"
        )
    if not heads and not offset:
        return tensor
    plain = replace(tensor, encoding=None)
    return replace(plain, encoding=GgufBlocks(plain, tensor.type, heads, offset))
