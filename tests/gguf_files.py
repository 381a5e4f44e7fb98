"""Write tiny GGUF files with random weights, as llama.cpp's converter lays them out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from tests.family_bases import randomize

#: A multiple of every block.
HIDDEN = 256
MERGES = ["t h", "i n", "Ġ th", "e r"]
TOKENS = ["<|pad|>", "<|end|>", *bytes_to_unicode().values(), *(m.replace(" ", "") for m in MERGES)]

_SETTINGS: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HEAD = {"head_dim": 64}
#: Sizes that transformers does not read from a file.
_QWEN3 = {"head_dim": 128}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
#: By architecture: model_type, name in transformers' mapping, settings.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", _QWEN3),
    "qwen3moe": ("qwen3_moe", "qwen3_moe", {**_EXPERTS, **_QWEN3}),
    "gemma2": ("gemma2", "gemma2", {**_HEAD, "sliding_window": 6}),
    "gemma3": ("gemma3_text", "gemma3", {**_HEAD, "sliding_window": 6}),
    "nemotron": ("nemotron", "nemotron", {}),
    "phi3": ("phi3", "phi3", {}),
    "stablelm": ("stablelm", "stablelm", {}),
    "starcoder2": ("starcoder2", "starcoder2", {}),
}
#: Types that ``gguf`` can write; blocks of the others are drawn at random.
WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
#: Position of the fp16 numbers in a block.
_SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
K_QUANTS = tuple(_SCALES_AT)


def write_gguf(
    path: Path,
    architecture: str,
    kind: str = "Q8_0",
    chat_template: str | None = None,
    tensors_per_part: int = 0,
    **settings: Any,
) -> Path:
    """Write a model of an architecture whose matrices are stored as ``kind``.

    Returns:
        ``path``, or with ``tensors_per_part`` the first part.
    """
    model_type, mapping, own = ARCHITECTURES[architecture]
    path.parent.mkdir(exist_ok=True)
    config = AutoConfig.for_model(model_type, **{**_SETTINGS, **own, **settings})
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    for key, setting in GGUF_CONFIG_MAPPING[mapping].items():
        if setting:
            _add(writer, f"{architecture}.{key}", _setting(config, setting))
    _add_tokenizer(writer)
    writer.add_license("Apache-2.0")
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    state = model.state_dict()
    for name, parameter in get_gguf_hf_weights_map(model, processor).items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _as_stored(name, state[parameter], architecture, config)
        own_name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        _add_tensor(writer, own_name, values.float().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), path)


def _setting(config: PretrainedConfig, name: str) -> Any:
    value = getattr(config, name, None)
    rope = getattr(config, "rope_parameters", None) or {}
    nested = next((v for v in rope.values() if isinstance(v, dict)), {})
    return value if value is not None else rope.get(name, nested.get(name))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)


def _as_stored(
    name: str, values: torch.Tensor, architecture: str, config: PretrainedConfig
) -> torch.Tensor:
    if match := re.search(r"ffn_(gate|up)_exps", name):
        return values.chunk(2, dim=1)[0 if match[1] == "gate" else 1]
    if architecture == "llama" and (match := re.search(r"\.attn_(q|k)\.", name)):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        halves = values.view(heads, 2, -1, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)
    if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return values + 1
    return values


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(values))
        return
    form = gguf.GGMLQuantizationType[kind]
    if kind in WRITTEN:
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), form), raw_dtype=form)
        return
    block, size = gguf.GGML_QUANT_SIZES[form]
    shape = (*values.shape[:-1], values.shape[-1] // block * size)
    generator = np.random.default_rng(len(name))
    raw = generator.integers(0, 256, shape, dtype=np.uint8)
    # Keep the random scales finite: the exponent of every fp16 number in the block is small.
    blocks = raw.reshape(-1, size)
    for start in _SCALES_AT[kind]:
        blocks[:, start + 1] = 0x08
    assert np.isfinite(dequantize(raw, form)).all()
    writer.add_tensor(name, raw, raw_dtype=form)
