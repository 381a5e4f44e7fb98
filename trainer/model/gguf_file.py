"""Read a model from a GGUF file: config and tokenizer as transformers derives them, and weights.

Weights are dequantized by rows with the ``gguf`` library, as transformers does for whole tensors
(``transformers.modeling_gguf_pytorch_utils``).

Shape letters: E experts, N output features, K input features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from trainer.model.gguf_header import FLOATS, plain_arrays, read_gguf_header
from trainer.model.library_errors import library_errors
from trainer.model.safetensors_reader import ReadBytes, StoredTensor
from trainer.model.transformers_model import build_transformers_model, limit_parameters
from trainer.runtime.errors import BadInput

#: Architectures whose files hold the weight of a norm plus one.
_NORM_PLUS_ONE = ("gemma2", "gemma3", "nemotron")
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
    dtype: ClassVar[torch.dtype] = torch.float32

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
        BadInput: as ``read_gguf_header``, and if transformers cannot read the file.
    """
    header = read_gguf_header(path, name)
    with library_errors(f"base.model: {name!r}"), plain_arrays():
        options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, **options)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, **options)
        tokenizer("A text.")
    stored = {tensor.name: _stored(file, tensor) for file, tensor in header.tensors}
    config.tie_word_embeddings = "output.weight" not in stored  # it may be in a later part
    return GgufModel(config, tokenizer, _rename(stored, config, header.architecture, name))


def _stored(path: Path, tensor: Any) -> StoredTensor:
    """A tensor of the file, in blocks unless it is of a float type."""
    kind = tensor.tensor_type.name
    shape = tuple(int(size) for size in reversed(tensor.shape))
    stored = StoredTensor(path, kind, shape, int(tensor.data_offset), int(tensor.n_bytes))
    return stored if kind in FLOATS else replace(stored, encoding=GgufBlocks(stored, kind))


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
