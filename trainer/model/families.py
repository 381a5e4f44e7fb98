"""What differs between model families. Nothing elsewhere asks for a model's name.

A family stands here when tests compare it with plain transformers: loss and prompt gradient, packed
and sharded. What a model's own modules tell (transposed weights, stacked experts, scaled
embeddings, buffers to rebuild) is read from them and needs no line here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from trainer.packing.activation_memory import LayerSizes
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        packed: its attention takes a packed batch of rows laid end to end; otherwise rows are
            padded.
        cached_attention: transformers' own attention for decoding and for padded rows; "eager"
            where its SDPA leaves out what the family needs (capped scores, sinks) or does not
            exist.
        refused: settings of the config that cannot be trained, each with the reason.
        no_past: why prefix tuning cannot train it; empty if it can.
    """

    packed: bool = True
    cached_attention: str = "sdpa"
    refused: dict[str, str] = field(default_factory=dict)
    no_past: str = ""


@dataclass(frozen=True)
class ActivationProfile:
    """What a layer keeps for backward; see ``trainer.packing.activation_memory.LayerSizes``."""

    mlp_tensors: int = 2
    norm_inputs: int = 2
    wide_norms: bool = False
    layer_norm: bool = False
    keeps_scores: bool = False


_EAGER = Family(cached_attention="eager")
_NO_PADDED_PAST = "its rows are padded, and keys and values are given to packed rows alone"
_PADDED = Family(packed=False, cached_attention="eager", no_past=_NO_PADDED_PAST)
_BOTH_WAYS = "tokens look at what follows them: not a causal model"

FAMILIES: dict[str, Family] = {
    "afmoe": Family(),
    "arcee": Family(),
    "biogpt": Family(),
    "bloom": _EAGER,
    "codegen": _EAGER,
    "cohere": Family(),
    "cohere2": Family(),
    "cwm": Family(),
    "deepseek_v2": Family(no_past="its keys and values are of different sizes"),
    "diffllama": Family(no_past="it pairs the heads of its values up behind the cache"),
    "doge": Family(packed=False, no_past=_NO_PADDED_PAST),
    "ernie4_5": Family(),
    "exaone4": Family(),
    "falcon": Family(),
    "flex_olmo": Family(),
    "gemma": Family(refused={"use_bidirectional_attention": _BOTH_WAYS}),
    "gemma2": Family(cached_attention="eager", refused={"use_bidirectional_attention": _BOTH_WAYS}),
    "gemma3_text": Family(refused={"use_bidirectional_attention": _BOTH_WAYS}),
    "glm": Family(),
    "glm4": Family(),
    "gpt2": Family(refused={"add_cross_attention": "it is the decoder of an encoder-decoder"}),
    "gpt_bigcode": Family(),
    "gpt_neo": _EAGER,
    "gpt_neox": Family(),
    "gpt_oss": _EAGER,
    "gptj": _EAGER,
    "granite": Family(),
    "granitemoe": Family(),
    "granitemoeshared": Family(),
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": Family(),
    "jais2": Family(),
    "llama": Family(),
    "mellum": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "mpt": _PADDED,
    "nanochat": Family(),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmoe": Family(),
    "opt": Family(),
    "persimmon": Family(),
    "phi": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(refused={"use_sliding_window": "its attention does not get the window"}),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
    "vaultgemma": _EAGER,
    "xglm": _PADDED,
}

_UNGATED = ActivationProfile(mlp_tensors=1, layer_norm=True)
_SQUARED = ActivationProfile(mlp_tensors=1)
_WIDE = ActivationProfile(wide_norms=True)

#: Families whose layers save something else than a gated MLP and two norms, see ``base.lean``.
SAVES: dict[str, ActivationProfile] = {
    "arcee": _SQUARED,
    "biogpt": _UNGATED,
    "bloom": ActivationProfile(mlp_tensors=1),
    "afmoe": ActivationProfile(norm_inputs=4, wide_norms=True),
    "cohere": ActivationProfile(norm_inputs=4, wide_norms=True),
    "cohere2": ActivationProfile(wide_norms=True),
    "diffllama": ActivationProfile(norm_inputs=7),
    "doge": ActivationProfile(norm_inputs=6),
    "falcon": _UNGATED,
    "gemma2": ActivationProfile(norm_inputs=4, keeps_scores=True),
    "gemma3_text": ActivationProfile(norm_inputs=4),
    "glm4": ActivationProfile(norm_inputs=4),
    "flex_olmo": _WIDE,
    "gpt2": _UNGATED,
    "gpt_bigcode": _UNGATED,
    "gpt_neox": _UNGATED,
    "gpt_oss": ActivationProfile(mlp_tensors=6, wide_norms=True, keeps_scores=True),
    "helium": _WIDE,
    "gptj": ActivationProfile(mlp_tensors=1),
    "hunyuan_v1_moe": ActivationProfile(mlp_tensors=4, norm_inputs=3),
    "jais2": _SQUARED,
    "mpt": ActivationProfile(mlp_tensors=1, norm_inputs=4),
    "nanochat": _WIDE,
    "nemotron": _SQUARED,
    "olmo": _WIDE,
    "olmo2": _WIDE,
    "olmo3": _WIDE,
    "opt": _UNGATED,
    "persimmon": ActivationProfile(norm_inputs=3),
    "phi": _UNGATED,
    "starcoder2": _UNGATED,
    "vaultgemma": ActivationProfile(keeps_scores=True),
    "xglm": ActivationProfile(mlp_tensors=1, keeps_scores=True),
}

#: Activations that transformers writes out step by step, each of which saves what it reads.
SLOW_GELUS = {"gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"}

#: Families that people may well ask for, and why they are not in the table.
UNSUPPORTED: dict[str, str] = {
    "deepseek_v3": "its router keeps state that is not a weight",
    "t5": "an encoder-decoder has no virtual tokens in front of its text",
    "bart": "an encoder-decoder has no virtual tokens in front of its text",
    "bert": "it is not a causal language model",
    "mamba": "a state-space model cannot read packed rows: state would leak from row to row",
    "mamba2": "a state-space model cannot read packed rows: state would leak from row to row",
    "rwkv": "a recurrent model cannot read packed rows: state would leak from row to row",
    "jamba": "its state-space layers cannot read packed rows: state would leak from row to row",
}

#: ALiBi has no longest position; without a word in the config, what such models were trained with.
UNSTATED_CONTEXT = 2048


def family_of(config: PretrainedConfig, name: str) -> Family:
    """The table's row for a model.

    Raises:
        BadInput: if the family, or this variant of it, cannot be trained; says why.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = UNSUPPORTED.get(config.model_type, "it has not been compared with transformers")
        raise BadInput(
            f"base.model: {name!r} is of family {config.model_type!r}, which is not supported "
            f"({reason}); supported: {', '.join(sorted(FAMILIES))}"
        )
    for setting, reason in family.refused.items():
        if getattr(config, setting, False):
            raise BadInput(
                f"base.model: {name!r} has {setting}={getattr(config, setting)} in config.json, "
                f"which is not supported ({reason})"
            )
    return family


def check_past(config: PretrainedConfig, name: str) -> None:
    """Whether prompts of keys and values can be trained.

    Raises:
        BadInput: if not; says why.
    """
    reason = family_of(config, name).no_past
    if reason:
        raise BadInput(
            f"prompts.method: prefix_tuning cannot train base.model {name!r} of family "
            f"{config.model_type!r} ({reason}); use prompt_tuning or p_tuning"
        )


def context_length(config: PretrainedConfig) -> int:
    """Longest prompt and row together.

    Where frequencies change with the longest row read at once ("longrope"), it ends where they
    would: a row's loss must not depend on its neighbours.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings"):
        return int(rope["original_max_position_embeddings"])
    for setting in ("max_position_embeddings", "seq_length", "max_seq_len"):
        length = getattr(config, setting, None)
        if length is not None:
            return int(length)
    return UNSTATED_CONTEXT


def logit_rule(model: PreTrainedModel) -> tuple[float, float | None]:
    """What a model does to its logits: the factor, then the cap (Gemma 2, nanochat) or None."""
    scale = getattr(model, "logit_scale", None)  # Cohere
    divisor = getattr(model.config, "logits_scaling", None)  # Granite
    factor = float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)
    return factor, getattr(model.config, "final_logit_softcapping", None)


def embedding_size(config: PretrainedConfig) -> int:
    """Of word embeddings and virtual tokens; OPT-350M projects them up behind."""
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def layer_sizes(config: PretrainedConfig) -> LayerSizes:
    """What of a model decides how much a packed batch through it saves.

    Names differ: an MLP's width is ``intermediate_size``, ``ffn_dim`` or ``n_inner``, and four
    times the hidden size where nothing is said.
    """
    saves = SAVES.get(config.model_type, ActivationProfile())
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head = int(_first(config, "head_dim") or hidden // heads)
    key_heads = int(_first(config, "num_key_value_heads", "num_kv_heads") or heads)
    experts = int(_first(config, "num_experts_per_tok") or 0)
    if not getattr(config, "is_moe", True):
        experts = 0
    widths: tuple[str, ...] = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    widths = ("moe_intermediate_size", *widths) if experts else widths
    width = int(_first(config, *widths) or (_first(config, "expansion_ratio") or 4) * hidden)
    # Experts that all tokens share stand beside those that are chosen.
    shared = -(-int(_first(config, "shared_expert_intermediate_size") or 0) // width)
    several = _first(config, "n_shared_experts", "num_shared_experts", "num_shared_expert") or 0
    shared += several
    slow = _first(config, "hidden_act", "activation_function", "hidden_activation") in SLOW_GELUS
    return LayerSizes(
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        query_width=heads * head,
        key_width=key_heads * head,
        mlp_width=width,
        mlp_tensors=saves.mlp_tensors + (3 if slow else 0),
        norm_inputs=saves.norm_inputs,
        wide_norms=saves.wide_norms,
        layer_norm=saves.layer_norm,
        experts_per_token=experts + shared,
        keeps_scores=saves.keeps_scores,
    )


def _first(config: PretrainedConfig, *names: str) -> Any:
    """The first of these settings that the config gives a value; the most of one for each layer."""
    values = (getattr(config, name, None) for name in names)
    found = next((value for value in values if value is not None), None)
    return max(found) if isinstance(found, list | tuple) else found
