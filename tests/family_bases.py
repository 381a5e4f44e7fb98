"""Tiny models of every family, and reference computations in plain transformers.

Every rule of a family takes effect: windows shorter than rows, capped scores, sinks, ALiBi with a
number of heads that is not a power of two, partial rotation, tied and untied heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextExperts
from transformers.pytorch_utils import Conv1D

from benchmarks.random_base import VOCAB_SIZE, make_tokenizer
from trainer.data.token_table import Example
from trainer.model.families import FAMILIES
from trainer.model.layers.quantization import dequantize_rows, quantize_rows
from trainer.packing.packed_row import PackedRow

HIDDEN = 48
WINDOW = 6
PROMPT_LENGTHS = [5, 8]
ROW_LENGTHS = [7, 20, 12, 5, 9, 13]

_BASIC = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_LLAMA = {
    **_BASIC,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_MOE = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}
_SMALL_EXPERTS = {**_MOE, "moe_intermediate_size": 40}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.1] * 6,
    "long_factor": [4.0] * 6,
}

_HALF = {"partial_rotary_factor": 0.5}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
#: Queries, keys and values of several sizes, by way of a smaller state.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

#: A dense layer and one with experts in groups, whose router has a correction bias.
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
_DENSE_FIRST = {**_ROUTED, "first_k_dense_replace": 1}


def _mrope(section: int, **more: Any) -> dict[str, Any]:
    """Rotary embedding of images: time, height and width have a section each."""
    sections = {"mrope_section": [section] * 3}
    return {"rope_parameters": {**_ROPE, **sections, **more}}


_LAYERS = {"mlp_layer_types": ["dense", "sparse"]}

_GEMMA4 = {
    **_LLAMA,
    **_ALTERNATING,
    "head_dim": 16,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
}
#: Layers read inputs by token id; the last two read keys and values of the others.
_PER_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "pad_token_id": 2,
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
#: A recurrent layer and one with attention.
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 12,
}
_MAMBA = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_CONV = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
_SHARED = {**_SMALL_EXPERTS, "shared_expert_intermediate_size": 32}

#: name of the case -> (model_type, settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {**_LLAMA, **_ALTERNATING, "use_sliding_window": True}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("gemma2", {**_LLAMA, **_ALTERNATING, "head_dim": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "gemma3_text",
        {**_LLAMA, **_ALTERNATING, "head_dim": 16, "rope_parameters": _ROPES},
    ),
    "gemma4": ("gemma4_text", _GEMMA4),
    "gemma4-moe": (
        "gemma4_text",
        {
            **_GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 4,
            "moe_intermediate_size": 40,
            "attention_k_eq_v": True,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_LLAMA,
            **_MAMBA,
            "mamba_d_ssm": 96,
            "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.5,
            "mlp_multipliers": [0.7, 1.3],
            "key_multiplier": 0.6,
            "attention_out_multiplier": 1.2,
            "ssm_multipliers": [0.5, 0.8, 1.1, 1.4, 0.9],
            "ssm_out_multiplier": 0.7,
        },
    ),
    "jamba": (
        "jamba",
        {
            **_LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            **_LLAMA,
            "intermediate_size_mlp": 96,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": WINDOW,
            "floor_scale": 4,
        },
    ),
    "gemma4-per-layer": ("gemma4_text", {**_GEMMA4, **_PER_LAYER}),
    "gemma3n": (
        "gemma3n_text",
        {
            **_LLAMA,
            **_PER_LAYER,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.9, 0.0] * 2,
            "rope_parameters": _ROPES,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi": ("phi", {**_LLAMA, **_HALF}),
    "phi3": ("phi3", {**_LLAMA, "sliding_window": WINDOW}),
    "phi3-longrope": (
        "phi3",
        {**_LLAMA, "rope_parameters": _LONG, "original_max_position_embeddings": 64},
    ),
    "gpt2": ("gpt2", {**_BASIC, "n_positions": 128}),
    "gpt_neox": (
        "gpt_neox",
        {**_BASIC, "intermediate_size": 64, "rotary_pct": 0.5, "max_position_embeddings": 128},
    ),
    "gptj": ("gptj", {**_BASIC, "rotary_dim": 4, "n_positions": 128, "n_inner": 64}),
    "opt": (
        "opt",
        {**_BASIC, "ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": HIDDEN},
    ),
    "opt-projected": (
        "opt",
        {
            **_BASIC,
            "ffn_dim": 64,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": False,
        },
    ),
    "bloom": ("bloom", {**_BASIC, "num_attention_heads": 12}),
    "falcon": ("falcon", {**_BASIC, "max_position_embeddings": 128}),
    "falcon-alibi": (
        "falcon",
        {**_BASIC, "num_attention_heads": 12, "alibi": True, "multi_query": False, "bias": True},
    ),
    "falcon-grouped": ("falcon", {**_BASIC, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": ("stablelm", {**_LLAMA, **_HALF, "use_qkv_bias": True, "qk_layernorm": True}),
    "cohere": ("cohere", {**_LLAMA, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**_LLAMA, **_ALTERNATING}),
    "olmo": ("olmo", {**_LLAMA, "clip_qkv": 1.0}),
    "olmo2": ("olmo2", _LLAMA),
    "starcoder2": ("starcoder2", {**_LLAMA, "sliding_window": WINDOW}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2_moe": ("qwen2_moe", {**_SMALL_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**_SMALL_EXPERTS, "head_dim": 16}),
    "olmoe": ("olmoe", _MOE),
    "gpt_oss": (
        "gpt_oss",
        {**_LLAMA, **_ALTERNATING, "head_dim": 16, "num_local_experts": 4},
    ),
    "afmoe": ("afmoe", {**_MOE, **_ALTERNATING, "head_dim": 12}),
    "arcee": ("arcee", _LLAMA),
    "bamba": (
        "bamba",
        {**_LLAMA, **_MAMBA, "attn_layer_indices": [1], "rope_parameters": {**_ROPE, **_HALF}},
    ),
    "biogpt": (
        "biogpt",
        {**_BASIC, "intermediate_size": 64, "max_position_embeddings": 128},
    ),
    "codegen": ("codegen", {**_BASIC, "rotary_dim": 4, "n_positions": 128, "n_inner": 64}),
    "cwm": ("cwm", {**_LLAMA, **_ALTERNATING, "head_dim": 12, "bos_token_id": 2}),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **_MOE,
            **_LATENT,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**_LLAMA, **_LATENT, **_DENSE_FIRST}),
    "diffllama": ("diffllama", _LLAMA),
    "doge": ("doge", _LLAMA),
    "dots1": ("dots1", {**_LLAMA, **_DENSE_FIRST, "head_dim": 12}),
    "ernie4_5": ("ernie4_5", _LLAMA),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            **_LLAMA,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 40,
            "moe_layer_start_index": 1,
        },
    ),
    "exaone4": ("exaone4", {**_LLAMA, **_ALTERNATING}),
    "exaone_moe": (
        "exaone_moe",
        {
            **_SMALL_EXPERTS,
            **_ALTERNATING,
            **_LAYERS,
            "num_shared_experts": 1,
            "head_dim": 12,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "flex_olmo": ("flex_olmo", _MOE),
    "glm": ("glm", {**_LLAMA, **_HALF, "head_dim": 12}),
    "glm4": ("glm4", {**_LLAMA, **_HALF, "head_dim": 12}),
    "glm4_moe": (
        "glm4_moe",
        {**_LLAMA, **_HALF, **_DENSE_FIRST, "head_dim": 12, "use_qk_norm": True},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**_LLAMA, **_LATENT, **_ROUTED, **_LAYERS}),
    "glm4v": ("glm4v_text", {**_LLAMA, **_mrope(1), **_HALF}),
    "glm4v_moe": (
        "glm4v_moe_text",
        {**_LLAMA, **_DENSE_FIRST, "head_dim": 12, **_mrope(1, **_HALF)},
    ),
    "gpt_bigcode": ("gpt_bigcode", {**_BASIC, "n_positions": 128}),
    "gpt_neo": (
        "gpt_neo",
        {
            **_BASIC,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
        },
    ),
    "granite": ("granite", {**_LLAMA, **_GRANITE}),
    "granitemoe": ("granitemoe", {**_MOE, **_GRANITE, "num_local_experts": 4}),
    "granitemoeshared": (
        "granitemoeshared",
        {**_MOE, **_GRANITE, "num_local_experts": 4, "shared_intermediate_size": 32},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MOE,
            **_GRANITE,
            **_MAMBA,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "helium": ("helium", {**_LLAMA, "head_dim": 12}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**_LLAMA, "head_dim": 16}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**_MOE, "head_dim": 16, "moe_topk": 2}),
    "jais2": ("jais2", _LLAMA),
    "lfm2": ("lfm2", {**_LLAMA, **_CONV, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("lfm2_moe", {**_SMALL_EXPERTS, **_CONV, "num_dense_layers": 1}),
    "mamba2": (
        "mamba2",
        {
            **{key: value for key, value in _BASIC.items() if key != "num_attention_heads"},
            "num_heads": 6,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "expand": 2,
        },
    ),
    "mellum": ("mellum", _MOE),
    "minimax_m2": (
        "minimax_m2",
        {**_MOE, "num_local_experts": 4, "head_dim": 12, "rotary_dim": 6},
    ),
    "ministral": (
        "ministral",
        {**_LLAMA, **_ALTERNATING, "head_dim": 16, "rope_parameters": _ROPE},
    ),
    "ministral3": ("ministral3", {**_LLAMA, "head_dim": 16, "sliding_window": WINDOW}),
    "mpt": ("mpt", {**_BASIC, "max_seq_len": 128, "expansion_ratio": 2, "n_heads": 12}),
    "nanochat": ("nanochat", _LLAMA),
    "nemotron": ("nemotron", {**_LLAMA, **_HALF}),
    "nemotron_h": (
        "nemotron_h",
        {
            **_LLAMA,
            **_ROUTED,
            "head_dim": 12,
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 40,
        },
    ),
    "olmo3": ("olmo3", {**_LLAMA, **_ALTERNATING}),
    "persimmon": (
        "persimmon",
        {**_BASIC, **_HALF, "intermediate_size": 64, "max_position_embeddings": 128},
    ),
    "qwen3_next": ("qwen3_next", {**_SHARED, **_DELTA, **_HALF}),
    "qwen3_5": ("qwen3_5_text", {**_LLAMA, **_DELTA, **_mrope(1, **_HALF)}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**_SHARED, **_DELTA, **_mrope(1, **_HALF)}),
    "qwen2_vl": ("qwen2_vl_text", {**_LLAMA, **_mrope(2), "tie_word_embeddings": True}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {**_LLAMA, **_mrope(2)}),
    "qwen3_vl": ("qwen3_vl_text", {**_LLAMA, **_mrope(2), "head_dim": 12}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", {**_SMALL_EXPERTS, **_mrope(2), "head_dim": 12}),
    "seed_oss": ("seed_oss", {**_LLAMA, "head_dim": 16}),
    "smollm3": (
        "smollm3",
        {**_LLAMA, **_ALTERNATING, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    ),
    "vaultgemma": (
        "vaultgemma",
        {**_LLAMA, **_ALTERNATING, "head_dim": 16, "attn_logit_softcapping": 2.0},
    ),
    "xglm": ("xglm", {**_BASIC, "ffn_dim": 64, "max_position_embeddings": 128}),
}


_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 1,
    "patch_size": 14,
    "out_hidden_size": HIDDEN,
}
#: Text models that transformers has only inside a container: its type and vision config.
CONTAINER_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2_vl", {"depth": 1, "embed_dim": 16, "num_heads": 1, "hidden_size": 48}),
    "qwen2_5_vl_text": ("qwen2_5_vl", {**_VISION, "fullatt_block_indexes": [0]}),
    "qwen3_vl_text": ("qwen3_vl", {**_VISION, "deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe_text": ("qwen3_vl_moe", {**_VISION, "deepstack_visual_indexes": [0]}),
    "glm4v_text": ("glm4v", _VISION),
    "glm4v_moe_text": ("glm4v_moe", _VISION),
}


def family_config(case: str, num_layers: int = 2) -> PretrainedConfig:
    """Return the config of a case.

    Args:
        num_layers: even; a family that names its layers one by one has as many as it names.
    """
    model_type, settings = CASES[case]
    settings = copy.deepcopy(settings)
    num_layers = max(num_layers, len(settings.get("layer_types", ())))
    if blocks := settings.get("layers_block_type"):
        settings["layers_block_type"] = blocks * (num_layers // 2)
        settings["num_hidden_layers"] = len(settings["layers_block_type"])
    elif "attn_layer_indices" in settings:
        settings["num_hidden_layers"] = num_layers
        settings["attn_layer_indices"] = list(range(1, num_layers, 2))
    elif not {"attention_types", "no_rope_layers"} & settings.keys():
        settings["num_hidden_layers"] = num_layers
        by_layer = {"layer_types", "mlp_layer_types", "activation_sparsity_pattern"}
        for types in by_layer & settings.keys():
            settings[types] = (settings[types] * num_layers)[:num_layers]
    return AutoConfig.for_model(model_type, **settings)


def class_of(config: PretrainedConfig) -> Any:
    """The auto class of a text model or its container."""
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    return next(kind for kind in kinds if type(config) in kind._model_mapping)


def save_family(folder: Path, case: str, num_layers: int = 2, **options: Any) -> Path:
    """Save a model with random weights, different in every parameter; see ``randomize``."""
    config = family_config(case, num_layers)
    if config.model_type in CONTAINER_OF:
        kind, vision = CONTAINER_OF[config.model_type]
        text = config.to_dict()
        tied = CASES[case][1].get("tie_word_embeddings", False)
        config = AutoConfig.for_model(
            kind, text_config=text, vision_config=vision, tie_word_embeddings=tied
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some layers draw their vectors, which ``randomize`` only changes
        model = class_of(config).from_config(config, attn_implementation="eager")
    randomize(model)
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def randomize(model: nn.Module) -> None:
    """Draw weights so large that attention is far from uniform; change biases, norms, buffers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * (0.5 if "sinks" in name else 0.1))
        persistent = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in persistent:
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)


def plain_model(folder: Path, quantization: str) -> Any:
    """Load the model in transformers; for int8 with the dequantized weights.

    transformers 5.0 has an SDPA for Gemma 2 that omits the cap on its scores.
    """
    config = AutoConfig.from_pretrained(folder)
    attention = FAMILIES[config.get_text_config().model_type].cached_attention
    options = {"attn_implementation": "eager"} if attention == "eager" else {}
    model = class_of(config).from_pretrained(folder, dtype=torch.float32, **options)
    model.set_experts_implementation("eager")
    if quantization == "int8":
        quantize_plain(model)
    return model.eval().requires_grad_(False)


def quantize_plain(model: Any) -> None:
    """Round the weights as int8 rows with one scale per output feature do."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, Conv1D):
            _round(module.weight, transposed=True)
        elif isinstance(module, Llama4Router):
            pass  # transformers' other routers are no linear layers
        elif isinstance(module, nn.Linear) and module is not head:
            _round(module.weight)
        elif isinstance(module, Llama4TextExperts):
            _round(module.gate_up_proj, transposed=True)
            _round(module.down_proj, transposed=True)
        elif hasattr(module, "down_proj") and hasattr(module, "is_transposed"):
            gated = getattr(module, "has_gate", True)  # transformers 5.0 has no others
            _round(module.gate_up_proj if gated else module.up_proj, module.is_transposed)
            _round(module.down_proj, module.is_transposed)


def _round(weight: nn.Parameter, transposed: bool = False) -> None:
    rows = weight.data.mT if transposed else weight.data
    rounded = dequantize_rows(*quantize_rows(rows))
    weight.data = rounded.mT.contiguous() if transposed else rounded


def problem(hidden_size: int) -> tuple[list[PackedRow], list[Tensor]]:
    """Return rows of several lengths, alternating between two prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        Example.with_target(
            tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()), n // 2, i
        )
        for i, n in enumerate(ROW_LENGTHS)
    ]
    prompts = [torch.randn(p, hidden_size, generator=generator) * 0.3 for p in PROMPT_LENGTHS]
    return [PackedRow(row, i % 2, i) for i, row in enumerate(rows)], prompts


def with_text_around(packed_rows: Sequence[PackedRow]) -> list[PackedRow]:
    """Begin the rows of each prompt with the same tokens, two before it and one after it.

    The last row has other tokens before its prompt, up to its first label.
    """
    placed = []
    for row in packed_rows:
        example = row.example
        assert row.prompt is not None
        ids = (5 + row.prompt, 9, 11 + row.prompt, *example.input_ids)
        spans = tuple((start + 3, stop + 3) for start, stop in example.label_spans)
        placed.append(replace(row, example=Example(ids, spans, example.row, 2, 3)))
    last = placed[-1].example
    start = last.target_start
    alone = replace(last, prompt_at=start, prompt_end=start)
    return [*placed[:-1], replace(placed[-1], example=alone)]


def with_virtual_tokens(
    model: Any, ids: Tensor, prompt: Tensor, place: int = 0
) -> dict[str, Tensor]:
    """Arguments of transformers' forward for a row with virtual tokens after ``place`` tokens."""
    words, config = model.get_input_embeddings()(ids), model.config.get_text_config()
    if config.model_type == "falcon_h1":  # scales the embeddings of ids, not ``inputs_embeds``
        words = words * config.embedding_multiplier
    inputs = {"inputs_embeds": torch.cat([words[:place], prompt, words[place:]])[None]}
    if size := getattr(config, "hidden_size_per_layer_input", None):
        pads = torch.full((len(prompt),), config.pad_token_id)
        ids = torch.cat([ids[:place], pads, ids[place:]])
        text = next(m for m in model.modules() if hasattr(m, "embed_tokens_per_layer"))
        rows = text.embed_tokens_per_layer(ids)
        inputs["per_layer_inputs"] = rows.view(1, len(ids), config.num_hidden_layers, size)
    return inputs


def row_by_row(
    model: Any, pieces: Sequence[PackedRow], prompts: Sequence[Tensor]
) -> tuple[list[float], list[Tensor]]:
    """Mean loss per label of each prompt and its gradient, one row at a time, without a mask."""
    leaves = [prompt.clone().requires_grad_() for prompt in prompts]
    losses = []
    for k, leaf in enumerate(leaves):
        rows = [piece.example for piece in pieces if piece.prompt == k]
        total = torch.zeros(())
        for row in rows:
            ids = torch.tensor(row.input_ids)
            inputs = with_virtual_tokens(model, ids, leaf, row.prompt_at)
            logits = model(**inputs, use_cache=False).logits[0, len(leaf) :]
            start = row.target_start
            total = total + cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum")
        loss = total / sum(row.num_labels for row in rows)
        loss.backward()
        losses.append(loss.item())
    return losses, [leaf.grad for leaf in leaves if leaf.grad is not None]


def padded_loss(model: Any, rows: Sequence[Example]) -> Tensor:
    """Mean loss per label of a PeftModel on rows padded on the right."""
    longest = max(row.num_tokens for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for i, row in enumerate(rows):
        own = slice(row.target_start, row.num_tokens)
        ids_BT[i, : row.num_tokens] = torch.tensor(row.input_ids)
        mask_BT[i, : row.num_tokens] = 1
        labels_BT[i, own] = ids_BT[i, own]
    # PEFT's mask is of floats, which undoes the rounding of ALiBi that Falcon was trained with: one
    # row needs no mask.
    mask = mask_BT if len(rows) > 1 else None
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask).logits[:, -longest:]
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())


def errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return each tensor's largest difference, relative to its largest expected value."""
    apart = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True)
    ]
    assert not any(map(math.isnan, apart)), apart
    return apart
