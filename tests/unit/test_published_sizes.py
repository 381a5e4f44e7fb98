"""Sizes that ``plan`` reads from headers, against the published parameter counts of known models.

The settings are those of each model's config.json, and the tensors have their published names and
shapes. "Active" elements multiply a token: all but the embedding table, and of the experts those
chosen for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import AutoConfig

from trainer.config import Base
from trainer.cost_model.base_headers import base_shape_of, headers_of_values
from trainer.cost_model.base_shape import Header
from trainer.model.families import layer_sizes

Shapes = dict[str, tuple[int, ...]]
#: Tensors of one layer, from the settings of config.json and the index of the layer.
Layer = Callable[[dict[str, Any], int], Shapes]


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def norms(c: dict[str, Any], *names: str, bias: bool = False) -> Shapes:
    size = (c["hidden_size"],)
    return {f"{n}.{part}": size for n in names for part in ("weight", *(["bias"] if bias else []))}


def attention(c: dict[str, Any], bias: bool = False, out: str = "o_proj") -> Shapes:
    """Queries, keys and values in separate matrices."""
    hidden = c["hidden_size"]
    size = c.get("head_dim") or hidden // c["num_attention_heads"]
    heads, keys = c["num_attention_heads"], c.get("num_key_value_heads", c["num_attention_heads"])
    shapes: Shapes = {}
    for name, rows in (("q", heads), ("k", keys), ("v", keys)):
        shapes |= linear(f"self_attn.{name}_proj", rows * size, hidden, bias)
    return shapes | linear(f"self_attn.{out}", hidden, heads * size, bias and out != "o_proj")


def gated(c: dict[str, Any], width: int, name: str = "mlp") -> Shapes:
    hidden = c["hidden_size"]
    shapes = linear(f"{name}.gate_proj", width, hidden) | linear(f"{name}.up_proj", width, hidden)
    return shapes | linear(f"{name}.down_proj", hidden, width)


def llama(c: dict[str, Any], i: int) -> Shapes:
    names = ("input_layernorm", "post_attention_layernorm")
    return attention(c) | gated(c, c["intermediate_size"]) | norms(c, *names)


def qwen2(c: dict[str, Any], i: int) -> Shapes:
    return llama(c, i) | attention(c, bias=True)


def qwen3(c: dict[str, Any], i: int) -> Shapes:
    return llama(c, i) | {f"self_attn.{x}_norm.weight": (c["head_dim"],) for x in "qk"}


def gemma2(c: dict[str, Any], i: int) -> Shapes:
    return llama(c, i) | norms(c, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def gemma3(c: dict[str, Any], i: int) -> Shapes:
    return gemma2(c, i) | qwen3(c, i)


def phi3(c: dict[str, Any], i: int) -> Shapes:
    hidden, keys = c["hidden_size"], c["num_key_value_heads"]
    heads = c["num_attention_heads"]
    shapes = linear("self_attn.qkv_proj", (heads + 2 * keys) * hidden // heads, hidden)
    shapes |= linear("self_attn.o_proj", hidden, hidden)
    shapes |= linear("mlp.gate_up_proj", 2 * c["intermediate_size"], hidden)
    shapes |= linear("mlp.down_proj", hidden, c["intermediate_size"])
    return shapes | norms(c, "input_layernorm", "post_attention_layernorm")


def experts(c: dict[str, Any], count: int, name: str = "mlp") -> Shapes:
    """A router and experts in separate matrices."""
    width = c["moe_intermediate_size"]
    shapes = linear(f"{name}.gate", count, c["hidden_size"])
    for index in range(count):
        shapes |= gated(c, width, f"{name}.experts.{index}")
    return shapes


def mixtral(c: dict[str, Any], i: int) -> Shapes:
    hidden, width, name = c["hidden_size"], c["intermediate_size"], "block_sparse_moe"
    shapes = linear(f"{name}.gate", c["num_local_experts"], hidden)
    for index in range(c["num_local_experts"]):
        for part, shape in (
            ("w1", (width, hidden)),
            ("w3", (width, hidden)),
            ("w2", (hidden, width)),
        ):
            shapes[f"{name}.experts.{index}.{part}.weight"] = shape
    return attention(c) | shapes | norms(c, "input_layernorm", "post_attention_layernorm")


def qwen2_moe(c: dict[str, Any], i: int) -> Shapes:
    shapes = gated(c, c["shared_expert_intermediate_size"], "mlp.shared_expert")
    shapes |= linear("mlp.shared_expert_gate", 1, c["hidden_size"])
    shapes |= norms(c, "input_layernorm", "post_attention_layernorm")
    return attention(c, bias=True) | experts(c, c["num_experts"]) | shapes


def qwen3_moe(c: dict[str, Any], i: int) -> Shapes:
    dense = {name: shape for name, shape in qwen3(c, i).items() if "mlp" not in name}
    return dense | experts(c, c["num_experts"])


def deepseek(c: dict[str, Any], i: int) -> Shapes:
    """Keys and values from a latent state; shared experts; dense layers first."""
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    query = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    shapes = linear("self_attn.kv_a_proj_with_mqa", latent + c["qk_rope_head_dim"], hidden)
    values = heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    shapes |= linear("self_attn.kv_b_proj", values, latent)
    shapes |= {"self_attn.kv_a_layernorm.weight": (latent,)}
    if rank := c["q_lora_rank"]:
        shapes |= linear("self_attn.q_a_proj", rank, hidden)
        shapes |= linear("self_attn.q_b_proj", query, rank)
        shapes |= {"self_attn.q_a_layernorm.weight": (rank,)}
    else:
        shapes |= linear("self_attn.q_proj", query, hidden)
    shapes |= linear("self_attn.o_proj", hidden, heads * c["v_head_dim"])
    shapes |= norms(c, "input_layernorm", "post_attention_layernorm")
    if i < c["first_k_dense_replace"]:
        return shapes | gated(c, c["intermediate_size"])
    shared = c["n_shared_experts"] * c["moe_intermediate_size"]
    shapes |= gated(c, shared, "mlp.shared_experts")
    return shapes | experts(c, c["n_routed_experts"])


def gpt_oss(c: dict[str, Any], i: int) -> Shapes:
    """Experts in MXFP4: two values in a byte, 32 values with one exponent."""
    hidden, width, count = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    shapes = attention(c, bias=True) | linear("mlp.router", count, hidden, bias=True)
    shapes |= {"self_attn.o_proj.bias": (hidden,), "self_attn.sinks": (c["num_attention_heads"],)}
    for name, rows, columns in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
        stacked = f"mlp.experts.{name}_proj"
        shapes[f"{stacked}_blocks"] = (count, rows, columns // 32, 16)
        shapes[f"{stacked}_scales"] = (count, rows, columns // 32)
        shapes[f"{stacked}_bias"] = (count, rows)
    return shapes | norms(c, "input_layernorm", "post_attention_layernorm")


def llama4(c: dict[str, Any], i: int) -> Shapes:
    hidden, width, count = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    name = "feed_forward"
    shapes = attention(c) | linear(f"{name}.router", count, hidden)
    shapes |= gated(c, width, f"{name}.shared_expert")
    shapes[f"{name}.experts.gate_up_proj"] = (count, hidden, 2 * width)
    shapes[f"{name}.experts.down_proj"] = (count, width, hidden)
    return shapes | norms(c, "input_layernorm", "post_attention_layernorm")


def granitemoe(c: dict[str, Any], i: int) -> Shapes:
    hidden, width, count = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    name = "block_sparse_moe"
    shapes = attention(c) | linear(f"{name}.router.layer", count, hidden)
    shapes[f"{name}.input_linear.weight"] = (count, 2 * width, hidden)
    shapes[f"{name}.output_linear.weight"] = (count, hidden, width)
    return shapes | norms(c, "input_layernorm", "post_attention_layernorm")


def cohere(c: dict[str, Any], i: int) -> Shapes:
    return attention(c) | gated(c, c["intermediate_size"]) | norms(c, "input_layernorm")


def olmo2(c: dict[str, Any], i: int) -> Shapes:
    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    shapes = attention(c) | gated(c, c["intermediate_size"])
    return shapes | norms(c, *names, "self_attn.q_norm", "self_attn.k_norm")


def fused(
    c: dict[str, Any], rows: int, bias: bool, block: str, *layer_norms: str, width: int = 4
) -> Shapes:
    """A fused QKV projection of ``rows`` output features, and an MLP without gate."""
    hidden = c["hidden_size"]
    shapes = linear(f"{block}.query_key_value", rows, hidden, bias)
    shapes |= linear(f"{block}.dense", hidden, hidden, bias)
    shapes |= linear("mlp.dense_h_to_4h", width * hidden, hidden, bias)
    shapes |= linear("mlp.dense_4h_to_h", hidden, width * hidden, bias)
    return shapes | norms(c, *layer_norms, bias=True)


def falcon(c: dict[str, Any], i: int) -> Shapes:
    size = c["hidden_size"] // c["num_attention_heads"]
    rows = c["hidden_size"] + 2 * c.get("num_kv_heads", 1) * size
    names = ("ln_attn", "ln_mlp") if "num_kv_heads" in c else ("input_layernorm",)
    return fused(c, rows, False, "self_attention", *names)


def bloom(c: dict[str, Any], i: int) -> Shapes:
    names = ("input_layernorm", "post_attention_layernorm")
    return fused(c, 3 * c["hidden_size"], True, "self_attention", *names)


def gpt_neox(c: dict[str, Any], i: int) -> Shapes:
    names = ("input_layernorm", "post_attention_layernorm")
    buffers = {"attention.bias": (1, 1, 2048, 2048), "attention.rotary_emb.inv_freq": (12,)}
    return fused(c, 3 * c["hidden_size"], True, "attention", *names) | buffers


def opt(c: dict[str, Any], i: int) -> Shapes:
    hidden, width = c["hidden_size"], c["ffn_dim"]
    shapes = attention(c, bias=True, out="out_proj")
    shapes |= linear("fc1", width, hidden, True) | linear("fc2", hidden, width, True)
    return shapes | norms(c, "self_attn_layer_norm", "final_layer_norm", bias=True)


def starcoder2(c: dict[str, Any], i: int) -> Shapes:
    hidden, width = c["hidden_size"], c["intermediate_size"]
    shapes = attention(c, bias=True) | {"self_attn.o_proj.bias": (hidden,)}
    shapes |= linear("mlp.c_fc", width, hidden, True) | linear("mlp.c_proj", hidden, width, True)
    return shapes | norms(c, "input_layernorm", "post_attention_layernorm", bias=True)


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        settings: of config.json.
        layer: tensors of one layer.
        parameters: published number, of the text model.
        active: published number, with the embedding table where it is counted; None: all.
        more: tensors outside the layers, beside tables and final norm.
        container: settings of config.json around those of the text model.
    """

    kind: str
    settings: dict[str, Any]
    layer: Layer
    parameters: int
    active: float | None = None
    prefix: str = "model."
    layers: str = "layers"
    table: str = "embed_tokens"
    head: str = "lm_head"
    more: Shapes = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    container: tuple[str, dict[str, Any]] | None = None


def sizes(
    layers: int, hidden: int, mlp: int, heads: int, keys: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_LLAMA3 = 128_256
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3 = {"head_dim": 128}
_QWEN3_MOE = {**_QWEN3, "num_experts": 128, "num_experts_per_tok": 8}
_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
#: OpenAI counts no embedding table among the active parameters: 0.58 billion.
_GPT_OSS = {"head_dim": 64, "num_experts_per_tok": 4}
_VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152}

MODELS = {
    "Llama-2-7B": Published("llama", sizes(32, 4096, 11_008, 32, 32, 32_000), llama, 6_738_415_616),
    "Llama-2-70B": Published(
        "llama", sizes(80, 8192, 28_672, 64, 8, 32_000), llama, 68_976_648_192
    ),
    "Llama-3.1-8B": Published(
        "llama", sizes(32, 4096, 14_336, 32, 8, _LLAMA3), llama, 8_030_261_248
    ),
    "Llama-3.1-70B": Published(
        "llama", sizes(80, 8192, 28_672, 64, 8, _LLAMA3), llama, 70_553_706_496
    ),
    "Llama-3.1-405B": Published(
        "llama", sizes(126, 16_384, 53_248, 128, 8, _LLAMA3), llama, 405_853_388_800
    ),
    "Llama-3.2-1B": Published(
        "llama", sizes(16, 2048, 8192, 32, 8, _LLAMA3, **_TIED), llama, 1_235_814_400
    ),
    "SmolLM2-1.7B": Published(
        "llama", sizes(24, 2048, 8192, 32, 32, 49_152, **_TIED), llama, 1_711_376_384
    ),
    "Mistral-7B": Published(
        "mistral", sizes(32, 4096, 14_336, 32, 8, 32_000), llama, 7_241_732_096
    ),
    "Qwen2.5-0.5B": Published(
        "qwen2", sizes(24, 896, 4864, 14, 2, 151_936, **_TIED), qwen2, 494_032_768
    ),
    "Qwen2.5-7B": Published("qwen2", sizes(28, 3584, 18_944, 28, 4, 152_064), qwen2, 7_615_616_512),
    "Qwen2.5-72B": Published(
        "qwen2", sizes(80, 8192, 29_568, 64, 8, 152_064), qwen2, 72_706_203_648
    ),
    "Qwen3-8B": Published(
        "qwen3", sizes(36, 4096, 12_288, 32, 8, 151_936, **_QWEN3), qwen3, 8_190_735_360
    ),
    "Qwen3-32B": Published(
        "qwen3", sizes(64, 5120, 25_600, 64, 8, 151_936, **_QWEN3), qwen3, 32_762_123_264
    ),
    "Gemma-2-9B": Published(
        "gemma2",
        sizes(42, 3584, 14_336, 16, 8, 256_000, head_dim=256, **_TIED),
        gemma2,
        9_241_705_984,
    ),
    "Gemma-2-27B": Published(
        "gemma2",
        sizes(46, 4608, 36_864, 32, 16, 256_000, head_dim=128, **_TIED),
        gemma2,
        27_227_128_320,
    ),
    "Gemma-3-27B": Published(
        "gemma3_text",
        sizes(62, 5376, 21_504, 32, 16, 262_208, head_dim=128, **_TIED),
        gemma3,
        27_009_346_304,
        prefix="language_model.model.",
        more={
            "vision_tower.encoder.layers.0.mlp.fc1.weight": (4304, 1152),
            "multi_modal_projector.mm_input_projection_weight": (1152, 5376),
        },
        container=("gemma3", {"vision_config": _VISION}),
    ),
    "Phi-3-mini": Published(
        "phi3", sizes(32, 3072, 8192, 32, 32, 32_064, pad_token_id=0), phi3, 3_821_079_552
    ),
    "Phi-4": Published(
        "phi3", sizes(40, 5120, 17_920, 40, 10, 100_352, pad_token_id=0), phi3, 14_659_507_200
    ),
    "OLMo-2-7B": Published("olmo2", sizes(32, 4096, 11_008, 32, 32, 100_352), olmo2, 7_298_617_344),
    "Command-R": Published(
        "cohere", sizes(40, 8192, 22_528, 64, 64, 256_000, **_TIED), cohere, 34_980_831_232
    ),
    "Granite-3.1-8B": Published(
        "granite", sizes(40, 4096, 12_800, 32, 8, 49_155, **_TIED), llama, 8_170_848_256
    ),
    "StarCoder2-15B": Published(
        "starcoder2",
        sizes(40, 6144, 24_576, 48, 4, 49_152, tie_word_embeddings=False),
        starcoder2,
        15_957_889_024,
        more={"model.norm.bias": (6144,)},
    ),
    "Falcon-7B": Published(
        "falcon",
        sizes(32, 4544, 18_176, 71, 71, 65_024, **_TIED),
        falcon,
        6_921_720_704,
        prefix="transformer.",
        layers="h",
        table="word_embeddings",
        more={"lm_head.weight": (65_024, 4544), "transformer.ln_f.bias": (4544,)},
    ),
    "Falcon-40B": Published(
        "falcon",
        sizes(60, 8192, 32_768, 128, 128, 65_024, num_kv_heads=8, new_decoder_architecture=True)
        | _TIED,
        falcon,
        41_303_293_952,
        prefix="transformer.",
        layers="h",
        table="word_embeddings",
        more={"lm_head.weight": (65_024, 8192), "transformer.ln_f.bias": (8192,)},
    ),
    "GPT-NeoX-20B": Published(
        "gpt_neox",
        sizes(44, 6144, 24_576, 64, 64, 50_432),
        gpt_neox,
        20_554_567_680,
        prefix="gpt_neox.",
        table="embed_in",
        head="embed_out",
        more={"gpt_neox.final_layer_norm.bias": (6144,)},
    ),
    "BLOOM": Published(
        "bloom",
        sizes(70, 14_336, 57_344, 112, 112, 250_880, **_TIED),
        bloom,
        176_247_271_424,
        prefix="",
        layers="h",
        table="word_embeddings",
        more={
            "ln_f.bias": (14_336,),
            "word_embeddings_layernorm.weight": (14_336,),
            "word_embeddings_layernorm.bias": (14_336,),
        },
    ),
    "OPT-66B": Published(
        "opt",
        sizes(64, 9216, 0, 72, 72, 50_272, ffn_dim=36_864, word_embed_proj_dim=9216) | _TIED,
        opt,
        65_719_701_504,
        prefix="model.decoder.",
        more={
            "lm_head.weight": (50_272, 9216),
            "model.decoder.embed_positions.weight": (2050, 9216),
            "model.decoder.final_layer_norm.bias": (9216,),
        },
    ),
    "Mixtral-8x7B": Published(
        "mixtral",
        sizes(32, 4096, 14_336, 32, 8, 32_000, **_MIXTRAL),
        mixtral,
        46_702_792_704,
        active=12.88e9,
    ),
    "Mixtral-8x22B": Published(
        "mixtral",
        sizes(56, 6144, 16_384, 48, 8, 32_768, **_MIXTRAL),
        mixtral,
        140_630_071_296,
        active=39.15e9,
    ),
    "Qwen1.5-MoE-A2.7B": Published(
        "qwen2_moe",
        sizes(
            *(24, 2048, 5632, 16, 16, 151_936),
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
        qwen2_moe,
        14_315_784_192,
        active=2.69e9,
    ),
    "Qwen3-30B-A3B": Published(
        "qwen3_moe",
        sizes(48, 2048, 6144, 32, 4, 151_936, **_QWEN3_MOE, moe_intermediate_size=768),
        qwen3_moe,
        30_532_122_624,
        active=3.35e9,
    ),
    "Qwen3-235B-A22B": Published(
        "qwen3_moe",
        sizes(94, 4096, 12_288, 64, 4, 151_936, **_QWEN3_MOE, moe_intermediate_size=1536),
        qwen3_moe,
        235_093_634_560,
        active=22.19e9,
    ),
    "Granite-3.1-3B-A800M": Published(
        "granitemoe",
        sizes(32, 1536, 512, 24, 8, 49_155, num_local_experts=40, num_experts_per_tok=8) | _TIED,
        granitemoe,
        3_298_793_472,
        active=0.88e9,
    ),
    "DeepSeek-V2-Lite": Published(
        "deepseek_v2",
        sizes(
            *(27, 2048, 10_944, 16, 16, 102_400),
            **_LATENT,
            q_lora_rank=None,
            first_k_dense_replace=1,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
        ),
        deepseek,
        15_706_484_224,
        active=2.66e9,
    ),
    "DeepSeek-V3": Published(
        "deepseek_v3",
        sizes(
            *(61, 7168, 18_432, 128, 128, 129_280),
            **_LATENT,
            q_lora_rank=1536,
            first_k_dense_replace=3,
            moe_intermediate_size=2048,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
        ),
        deepseek,
        671_026_419_200,
        active=37.55e9,
        more={  # scales, and the layer for multi-token prediction
            "model.layers.0.self_attn.q_a_proj.weight_scale_inv": (12, 56),
            "model.layers.61.embed_tokens.weight": (129_280, 7168),
            "model.layers.61.eh_proj.weight": (7168, 14_336),
        },
        types={"_proj": "F8_E4M3", "kv_a": "F8_E4M3"},
    ),
    "gpt-oss-20b": Published(
        "gpt_oss",
        sizes(24, 2880, 2880, 64, 8, 201_088, **_GPT_OSS, num_local_experts=32),
        gpt_oss,
        20_914_757_184,
        active=3.61e9 + 0.58e9,
        types={"_blocks": "U8", "_scales": "U8"},
    ),
    "gpt-oss-120b": Published(
        "gpt_oss",
        sizes(36, 2880, 2880, 64, 8, 201_088, **_GPT_OSS, num_local_experts=128),
        gpt_oss,
        116_829_156_672,
        active=5.13e9 + 0.58e9,
        types={"_blocks": "U8", "_scales": "U8"},
    ),
    "Llama-4-Scout": Published(
        "llama4_text",
        sizes(
            *(48, 5120, 8192, 40, 8, 202_048),
            head_dim=128,
            intermediate_size_mlp=16_384,
            num_local_experts=16,
            num_experts_per_tok=1,
        ),
        llama4,
        107_769_861_120,
        active=17.17e9,
        prefix="language_model.model.",
        head="language_model.lm_head",
        more={"vision_model.patch_embedding.linear.weight": (1408, 588)},
        container=("llama4", {"tie_word_embeddings": False}),
    ),
    "Qwen2.5-VL-7B": Published(  # the settings of the text model are at the top of config.json
        "qwen2_5_vl_text",
        sizes(28, 3584, 18_944, 28, 4, 152_064),
        qwen2,
        7_615_616_512,
        more={"visual.merger.mlp.0.weight": (5120, 5120)},
        container=("qwen2_5_vl", {"tie_word_embeddings": False}),
    ),
    "Qwen3-VL-30B-A3B": Published(
        "qwen3_vl_moe_text",
        sizes(48, 2048, 6144, 32, 4, 151_936, **_QWEN3_MOE, moe_intermediate_size=768),
        qwen3_moe,
        30_532_122_624,
        active=3.35e9,
        prefix="model.language_model.",
        more={"model.visual.merger.linear_fc1.weight": (4608, 4608)},
        container=("qwen3_vl_moe", {"tie_word_embeddings": False}),
    ),
    "Mistral-Small-3.1": Published(  # its container ties the head by default
        "mistral",
        sizes(40, 5120, 32_768, 32, 8, 131_072, head_dim=128),
        llama,
        23_572_403_200,
        prefix="language_model.model.",
        head="language_model.lm_head",
        more={"vision_tower.patch_conv.weight": (1024, 3, 14, 14)},
        container=("mistral3", {}),
    ),
}


def config_of(model: Published) -> Any:
    settings = dict(model.settings)
    if model.container is None:
        return AutoConfig.for_model(model.kind, **settings)
    kind, around = model.container
    return AutoConfig.for_model(kind, text_config={"model_type": model.kind, **settings}, **around)


def headers_of(model: Published) -> dict[str, Header]:
    c = model.settings
    table = (c["vocab_size"], c["hidden_size"])
    norm = {"h": "ln_f"}.get(model.layers, "norm")
    norm = "final_layer_norm" if f"{model.prefix}final_layer_norm.bias" in model.more else norm
    shapes = {
        f"{model.prefix}{model.table}.weight": table,
        f"{model.prefix}{norm}.weight": table[1:],
    }
    if not c.get("tie_word_embeddings"):
        shapes[f"{model.head}.weight"] = table
    for i in range(c["num_hidden_layers"]):
        layer = model.layer(c, i).items()
        shapes |= {f"{model.prefix}{model.layers}.{i}.{name}": shape for name, shape in layer}

    def kind(name: str) -> str:
        return next((kind for part, kind in model.types.items() if part in name), "BF16")

    return {name: Header(kind(name), shape) for name, shape in (shapes | model.more).items()}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_active_parameters_are_those_published(name: str) -> None:
    model, settings = MODELS[name], Base(model=name)
    config, headers = config_of(model), headers_of(model)
    if model.types:
        headers = headers_of_values(headers)
    shape = base_shape_of(headers, config, settings, itemsize=2)
    elements = sum(weight.elements for weight in (*shape.weights, *shape.tables))
    assert elements == pytest.approx(model.parameters, rel=1e-5)

    table = shape.embedding.elements
    untied = table * (shape.head is not shape.embedding)
    active = shape.multiplied + shape.head.elements + (untied if model.active else 0)
    assert active == pytest.approx(model.active or elements - untied, rel=0.01)

    tables = sum(weight.elements for weight in shape.tables)  # in 16 bits
    assert shape.resident_bytes(1) == pytest.approx(elements + tables, rel=0.015)


@pytest.mark.parametrize("name", MODELS)
def test_the_mlp_of_the_last_layer_is_found_by_its_names(name: str) -> None:
    model = MODELS[name]
    config, headers = config_of(model), headers_of(model)
    if model.types:
        headers = headers_of_values(headers)
    shape = base_shape_of(headers, config, Base(model=name), itemsize=2)
    text = config.get_text_config()
    if not layer_sizes(text).limits_last_mlp:
        return
    multiplied, recomputed = shape.last_mlp
    last = [w for w in shape.weights if w.layer == text.num_hidden_layers - 1]
    assert 0.3 < multiplied / sum(w.used * w.elements for w in last) < 1
    assert 0 < recomputed < multiplied


@pytest.mark.parametrize(
    ("name", "width"),
    [("Llama-3.1-8B", 1024), ("Gemma-2-9B", 2048), ("Falcon-7B", 64), ("Falcon-40B", 8192)],
)
def test_width_of_keys_of_published_models(name: str, width: int) -> None:
    assert layer_sizes(config_of(MODELS[name]).get_text_config()).key_width == width
