"""The table of supported model families; the only module that depends on ``model_type``.

A family is added once tests compare its loss and prompt gradient with transformers, packed and
sharded. Properties of a model's modules (transposed weights, stacked experts, scaled embeddings,
buffers to rebuild) are read from the modules and need no entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers import __version__ as TRANSFORMERS_VERSION

from trainer.model.tokenizer_file import CONTEXT_SETTINGS
from trainer.model.unsupported_families import UNSUPPORTED
from trainer.packing.activation_memory import LayerSizes
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    Attributes:
        packed: attention runs on packed rows; otherwise rows are padded.
        recurrent: layers pass a state from token to token, so that rows are padded.
        cached_attention: transformers' attention for decoding and for padded rows: "eager" if its
            SDPA omits a part of this family's attention (capped scores, sinks) or does not exist.
        refused: unsupported settings of config.json, each with the reason.
        scale_of_ids: setting of config.json that scales embeddings of token ids, but not virtual
            tokens; empty if the model scales both or neither.
        no_prefix_tuning: reason why prefix tuning is not supported; empty if it is supported.
        shared_expert: an MLP of intermediate_size beside the experts, without a setting of its own.
        limits_last_mlp, limits_ends: see ``LayerSizes``; False if
            ``trainer.model.layers.end_layers`` does not apply to the MLP, or to the layers.
        mlp_tensors, norm_inputs, wide_norms, layer_norm, query_norms, keeps_scores: activations
            that a layer saves for backward, see ``trainer.packing.activation_memory.LayerSizes``.
            The defaults describe a gated MLP and norms of the layer, queries and keys; see
            ``trainer.model.layers.fused_ops``.
    """

    packed: bool = True
    recurrent: bool = False
    cached_attention: str = "sdpa"
    refused: dict[str, str] = field(default_factory=dict)
    scale_of_ids: str = ""
    no_prefix_tuning: str = ""
    shared_expert: bool = False
    limits_last_mlp: bool = True
    limits_ends: bool = True
    mlp_tensors: int = 2
    norm_inputs: int = 2
    wide_norms: bool = False
    layer_norm: bool = False
    query_norms: bool = True
    keeps_scores: bool = False


_PADDED_ROWS = "its rows are padded, and keys and values can only precede packed rows"
_SHARED_KEYS = "its last layers read keys and values of earlier layers"
_TWO_SIZES = "its keys and values are of different sizes"
_BIDIRECTIONAL = {
    "use_bidirectional_attention": "tokens attend to later tokens: not a causal model"
}
#: Families to which the defaults of ``Family`` apply.
_PLAIN = """
    cwm dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe glm glm4_moe glm4v_moe_text granite
    hunyuan_v1_dense llama mellum minimax_m2 ministral ministral3
    mistral mixtral olmoe phi3 qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_moe
    qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 stablelm
"""
_UNGATED = ("falcon", "gpt_bigcode", "gpt_neox", "phi", "starcoder2")
_WIDE = ("cohere2", "flex_olmo", "helium", "nanochat", "olmo2", "olmo3")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_PLAIN.split(), Family()),
    **dict.fromkeys(("llama", "mistral", "phi3", "qwen2"), Family(query_norms=False)),
    **dict.fromkeys(_UNGATED, Family(mlp_tensors=1, layer_norm=True)),
    "biogpt": Family(limits_last_mlp=False, mlp_tensors=1, layer_norm=True),
    "opt": Family(limits_last_mlp=False, limits_ends=False, mlp_tensors=1, layer_norm=True),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), Family(limits_last_mlp=False)),
    **dict.fromkeys(_WIDE, Family(wide_norms=True)),
    **dict.fromkeys(("afmoe", "cohere"), Family(norm_inputs=4, wide_norms=True)),
    **dict.fromkeys(("arcee", "jais2", "nemotron"), Family(mlp_tensors=1)),
    "bloom": Family(cached_attention="eager", limits_last_mlp=False, mlp_tensors=1),
    "gptj": Family(cached_attention="eager", mlp_tensors=1),
    **dict.fromkeys(("codegen", "gpt_neo"), Family(cached_attention="eager")),
    **dict.fromkeys(
        ("deepseek_v2", "glm4_moe_lite"), Family(no_prefix_tuning=_TWO_SIZES, norm_inputs=3)
    ),
    "deepseek_v3": Family(no_prefix_tuning=_TWO_SIZES, norm_inputs=4),
    "diffllama": Family(
        no_prefix_tuning="it pairs the heads of its values after the cache", norm_inputs=7
    ),
    "doge": Family(packed=False, no_prefix_tuning=_PADDED_ROWS, norm_inputs=6),
    "gemma": Family(refused=_BIDIRECTIONAL),
    "gemma2": Family(
        cached_attention="eager", refused=_BIDIRECTIONAL, norm_inputs=4, keeps_scores=True
    ),
    "gemma3_text": Family(refused=_BIDIRECTIONAL, norm_inputs=4),
    # Its layers have four hidden states.
    "gemma3n_text": Family(no_prefix_tuning=_SHARED_KEYS, mlp_tensors=4, norm_inputs=23),
    "gemma4_text": Family(
        refused=_BIDIRECTIONAL,
        no_prefix_tuning=_TWO_SIZES,
        norm_inputs=7,
    ),
    "falcon_h1": Family(
        packed=False,
        recurrent=True,
        scale_of_ids="embedding_multiplier",
        no_prefix_tuning=_PADDED_ROWS,
        mlp_tensors=3,
        norm_inputs=4,
    ),
    **dict.fromkeys(("glm4", "glm4v_text"), Family(norm_inputs=4)),
    "gpt2": Family(
        refused={"add_cross_attention": "it is the decoder of an encoder-decoder"},
        mlp_tensors=1,
        layer_norm=True,
    ),
    "gpt_oss": Family(cached_attention="eager", mlp_tensors=6, wide_norms=True, keeps_scores=True),
    "hunyuan_v1_moe": Family(shared_expert=True, norm_inputs=3),
    "llama4_text": Family(shared_expert=True, limits_last_mlp=False, norm_inputs=4),
    "mpt": Family(
        packed=False,
        cached_attention="eager",
        no_prefix_tuning=_PADDED_ROWS,
        mlp_tensors=1,
        norm_inputs=4,
    ),
    "olmo": Family(wide_norms=True, norm_inputs=3),  # with clipped queries, keys and values
    "persimmon": Family(norm_inputs=3),
    "qwen2_moe": Family(refused={"use_sliding_window": "its attention does not get the window"}),
    **dict.fromkeys(
        (
            *("bamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba2", "nemotron_h"),
            *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
        ),
        Family(packed=False, recurrent=True, no_prefix_tuning=_PADDED_ROWS),
    ),
    "vaultgemma": Family(cached_attention="eager", keeps_scores=True),
    "xglm": Family(
        packed=False,
        cached_attention="eager",
        no_prefix_tuning=_PADDED_ROWS,
        mlp_tensors=1,
        keeps_scores=True,
    ),
}

#: Activation functions that transformers computes in several operations, each saving an input.
SLOW_GELUS = {"gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"}

#: Settings for the MLPs beside the experts: their width together; their number, of experts' width.
_SHARED_WIDTHS = (
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "shared_intermediate_size",
)
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")

#: Oldest release of transformers with which a family is known to pass its tests, if newer than the
#: oldest supported one; and the first that has the multimodal container of a supported text model.
FIRST_RELEASE: dict[str, str] = {
    **dict.fromkeys(("deepseek_v2", "diffllama", "doge"), "5.23"),
    **dict.fromkeys(("falcon_h1", "gemma3n_text", "jamba", "llama4_text"), "5.24"),
    "exaone4_5": "5.8",
    "exaone_moe": "5.1",
    **dict.fromkeys(("gemma4", "gemma4_text"), "5.5"),
    **dict.fromkeys(("glm4v_moe_text", "glm4v_text"), "5.2"),
    "hunyuan_v1_moe": "5.1",
    "kimi_k25": "5.13",
    "mellum": "5.10",
    **dict.fromkeys(("nemotron", "nemotron_h"), "5.23"),
    **dict.fromkeys(("qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text"), "5.2"),
    "qwen3_vl_moe_text": "5.4",
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"), "5.2"),
    "xglm": "5.3",
}

#: First release of transformers that caches the latent states of which DeepSeek's keys and values
#: are computed, instead of these.
LATENT_CACHE_RELEASE = "5.15"
#: Tokens of a chunk in transformers' gated delta rule.
DELTA_CHUNK = 64
#: Length with which ALiBi models were trained whose config sets no maximum length.
DEFAULT_CONTEXT_LENGTH = 2048


def check_model_type(raw: Mapping[str, Any], name: str) -> None:
    """Refuse the content of a config.json whose model type the installed transformers lacks.

    A type that the folder's own code implements is left to ``AutoConfig``, which names the code.

    Raises:
        BadInput: with the first release of transformers that has the type, if it is known.
    """
    text = raw.get("text_config")
    for config in (raw, text if isinstance(text, dict) else {}):
        kind = config.get("model_type")
        if isinstance(kind, str) and kind not in CONFIG_MAPPING:
            _check_release(kind, name)
            if config is raw and "auto_map" not in raw:
                raise BadInput(
                    f"base.model: {name!r} is of model type {kind!r}, which is not supported "
                    f"(transformers {TRANSFORMERS_VERSION} does not have it); supported: "
                    f"{', '.join(sorted(FAMILIES))}"
                )


def _check_release(kind: str, name: str) -> None:
    needed = FIRST_RELEASE.get(kind)
    if needed is not None and _release(TRANSFORMERS_VERSION) < _release(needed):
        raise BadInput(
            f"base.model: {name!r} is of model type {kind!r}, which needs transformers {needed} or "
            f"newer, but {TRANSFORMERS_VERSION} is installed: pip install --upgrade transformers"
        )


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def family_of(config: PretrainedConfig, name: str) -> Family:
    """Return the table's entry for a model.

    Raises:
        BadInput: with the reason, if the family, with the installed release of transformers, or a
            setting in config.json is not supported.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = UNSUPPORTED.get(config.model_type, "it has not been compared with transformers")
        raise BadInput(
            f"base.model: {name!r} is of family {config.model_type!r}, which is not supported "
            f"({reason}); supported: {', '.join(sorted(FAMILIES))}"
        )
    _check_release(config.model_type, name)
    for setting, reason in family.refused.items():
        if getattr(config, setting, False):
            raise BadInput(
                f"base.model: {name!r} has {setting}={getattr(config, setting)} in config.json, "
                f"which is not supported ({reason})"
            )
    return family


def check_prefix_tuning(config: PretrainedConfig, name: str) -> None:
    """Raise BadInput with the reason if prefix tuning is not supported for a model."""
    reason = family_of(config, name).no_prefix_tuning
    if reason:
        raise BadInput(
            f"prompts.method: prefix_tuning cannot train base.model {name!r} of family "
            f"{config.model_type!r} ({reason}); use prompt_tuning or p_tuning"
        )


def context_length(config: PretrainedConfig) -> int:
    """Maximum number of tokens of prompt and row together.

    With "longrope", the original length is the limit: if any row of a batch exceeded it, the
    frequencies, and thus the losses of the other rows, would change.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings"):
        return int(rope["original_max_position_embeddings"])
    for setting in CONTEXT_SETTINGS:
        length = getattr(config, setting, None)
        if length is not None:
            return int(length)
    return DEFAULT_CONTEXT_LENGTH


def embedding_scale(table: nn.Module, config: PretrainedConfig) -> float:
    """Return the factor by which a model multiplies the embeddings of token ids."""
    scales = [getattr(table, f"{x}embed_scale", None) for x in ("scalar_", "")]
    if setting := FAMILIES[config.model_type].scale_of_ids:
        scales.append(getattr(config, setting))
    return float(next((scale for scale in scales if scale is not None), 1.0))


def logit_scale_and_cap(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return the factor on the logits, and the soft cap (Gemma 2, nanochat) or None."""
    scale = getattr(model, "logit_scale", None)  # Cohere
    divisor = getattr(model.config, "logits_scaling", None)  # Granite
    factor = float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)
    factor *= float(getattr(model.config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    return factor, getattr(model.config, "final_logit_softcapping", None)


def embedding_size(config: PretrainedConfig) -> int:
    """Dimension of token embeddings and virtual tokens; OPT-350M projects these to hidden size."""
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def layer_sizes(config: PretrainedConfig) -> LayerSizes:
    """Return the sizes of a model's layers that determine its activation memory.

    Names differ between families: an MLP's width is ``intermediate_size``, ``ffn_dim`` or
    ``n_inner``, and by default four times the hidden size.
    """
    family = FAMILIES.get(config.model_type, Family())
    hidden = int(config.hidden_size)
    heads = int(_first(config, "num_attention_heads", "num_heads"))
    head_size = int(_first(config, "head_dim") or hidden // heads)
    if latent := _first(config, "qk_nope_head_dim"):  # keys are computed from a smaller state
        head_size = int(latent) + int(config.qk_rope_head_dim)
    key_heads = int(_first(config, "num_key_value_heads", "num_kv_heads") or heads)
    if _first(config, "new_decoder_architecture"):  # Falcon-40B repeats keys for each query head
        key_heads = heads
    elif _first(config, "multi_query"):  # Falcon-7B
        key_heads = 1
    experts = int(_first(config, "num_experts_per_tok", "top_k_experts") or 0)
    dense = getattr(config, "enable_moe_block", None)  # Gemma 4: a dense MLP beside the experts
    if not getattr(config, "is_moe", True) or dense is False:
        experts = 0
    widths: tuple[str, ...] = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    widths = ("moe_intermediate_size", *widths) if experts else widths
    width = int(_first(config, *widths) or (_first(config, "expansion_ratio") or 4) * hidden)
    shared = int(_first(config, *_SHARED_WIDTHS) or 0)
    shared = shared or width * int(_first(config, *_SHARED_COUNTS) or 0)
    if dense or family.shared_expert:
        shared = int(config.intermediate_size)
    recurrent, recurrent_work = _recurrent_sizes(config) if family.recurrent else (0, 0)
    slow = _first(config, "hidden_act", "activation_function", "hidden_activation") in SLOW_GELUS
    return LayerSizes(
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        query_width=heads * head_size,
        key_width=key_heads * head_size,
        mlp_width=width,
        mlp_tensors=family.mlp_tensors + (3 if slow else 0),
        norm_inputs=family.norm_inputs,
        wide_norms=family.wide_norms,
        layer_norm=family.layer_norm,
        query_norms=family.query_norms,
        experts_per_token=experts,
        shared_width=shared if experts else 0,
        keeps_scores=family.keeps_scores,
        recurrent=recurrent,
        recurrent_work=recurrent_work,
        cached_width=_latent_width(config, key_heads) if latent else 0,
        limits_last_mlp=family.packed and family.limits_last_mlp,
        limits_ends=family.packed and family.limits_ends,
    )


def _latent_width(config: PretrainedConfig, heads: int) -> int:
    """Elements that the cache of one layer has for a token, in families with latent attention."""
    rotated = int(config.qk_rope_head_dim)
    if _release(TRANSFORMERS_VERSION) >= _release(LATENT_CACHE_RELEASE):
        return int(config.kv_lora_rank) + rotated
    return heads * (int(config.qk_nope_head_dim) + rotated + int(config.v_head_dim))


def _recurrent_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """Saved elements per token of a recurrent layer, and those of its largest temporary tensor."""
    if delta_heads := _first(config, "linear_num_value_heads"):
        return 11 * int(delta_heads) * DELTA_CHUNK, int(delta_heads) * DELTA_CHUNK
    if _first(config, "mamba_dt_rank"):  # Mamba 1 (Jamba)
        width = int(config.mamba_expand) * int(config.hidden_size)
        return width * (3 * int(config.mamba_d_state) + 8), width * int(config.mamba_d_state)
    chunk = int(_first(config, "mamba_chunk_size", "chunk_size") or 0)
    if not chunk:  # a short convolution (LFM2)
        return 0, 0
    heads = int(_first(config, "mamba_n_heads", "mamba_num_heads", "num_heads"))
    size = int(_first(config, "mamba_d_head", "mamba_head_dim", "head_dim"))
    state = int(_first(config, "mamba_d_state", "ssm_state_size", "state_size"))
    return heads * (4 * chunk + 8 * size + 8 * state), heads * chunk * state


def _first(config: PretrainedConfig, *names: str) -> Any:
    """The first of these settings that is not None; of a list over layers, the maximum."""
    values = (_setting(config, name) for name in names)
    value = next((value for value in values if value is not None), None)
    return max(value) if isinstance(value, list | tuple) else value


def _setting(config: PretrainedConfig, name: str) -> Any:
    """A setting, or None; its values for all layers if they may differ (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError of transformers
        layers = config.per_layer_config
        return [getattr(layers[i], name) for i in range(config.num_hidden_layers)]
