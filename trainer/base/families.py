"""What differs between model families. Nothing elsewhere asks for a model's name.

A family stands here when tests compare it with plain transformers: loss and prompt gradient, packed
and sharded. What a model's own modules tell (transposed weights, stacked experts, scaled
embeddings, buffers to rebuild) is read from them and needs no line here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PretrainedConfig

from trainer.errors import BadInput


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        packed: its attention takes a stream of rows laid end to end; otherwise rows are padded.
        cached_attention: transformers' own attention for decoding and for padded rows; "eager"
            where its SDPA leaves out what the family needs (capped scores, sinks) or does not
            exist.
        experts: names of gate, up and down where a checkpoint has one tensor per expert.
        renamed: (in the checkpoint, in the model), parts of tensor names.
        refused: settings of the config that cannot be trained, each with the reason.
    """

    packed: bool = True
    cached_attention: str = "sdpa"
    experts: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


_EAGER = Family(cached_attention="eager")
_PADDED = Family(packed=False, cached_attention="eager")
_EXPERTS = Family(experts=("gate_proj", "up_proj", "down_proj"))
_GRANITE_EXPERTS = Family(
    renamed=(
        (".router.layer.weight", ".router.weight"),
        ("moe.input_linear.weight", "moe.experts.gate_up_proj"),
        ("moe.output_linear.weight", "moe.experts.down_proj"),
    )
)
_BOTH_WAYS = "tokens look at what follows them: not a causal model"

FAMILIES: dict[str, Family] = {
    "afmoe": _EXPERTS,
    "arcee": Family(),
    "biogpt": Family(),
    "bloom": _EAGER,
    "codegen": _EAGER,
    "cohere": Family(),
    "cohere2": Family(),
    "cwm": Family(),
    "deepseek_v2": _EXPERTS,
    "diffllama": Family(),
    "doge": Family(packed=False),
    "ernie4_5": Family(),
    "exaone4": Family(),
    "falcon": Family(),
    "flex_olmo": _EXPERTS,
    "gemma": Family(refused={"use_bidirectional_attention": _BOTH_WAYS}),
    "gemma2": Family(cached_attention="eager", refused={"use_bidirectional_attention": _BOTH_WAYS}),
    "gemma3_text": Family(refused={"use_bidirectional_attention": _BOTH_WAYS}),
    "glm": Family(),
    "glm4": Family(),
    "gpt2": Family(refused={"add_cross_attention": "it is the decoder of an encoder-decoder"}),
    "gpt_bigcode": Family(),
    "gpt_neo": _EAGER,
    "gpt_neox": Family(renamed=(("embed_out.", "lm_head."),)),
    "gpt_oss": _EAGER,
    "gptj": _EAGER,
    "granite": Family(),
    "granitemoe": _GRANITE_EXPERTS,
    "granitemoeshared": _GRANITE_EXPERTS,
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": _EXPERTS,
    "jais2": Family(),
    "llama": Family(),
    "mellum": _EXPERTS,
    "ministral": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mixtral": Family(experts=("w1", "w3", "w2"), renamed=((".block_sparse_moe.", ".mlp."),)),
    "mpt": _PADDED,
    "nanochat": Family(),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmoe": _EXPERTS,
    "opt": Family(),
    "persimmon": Family(),
    "phi": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_moe": _EXPERTS,
    "qwen3": Family(),
    "qwen3_moe": _EXPERTS,
    "seed_oss": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
    "vaultgemma": _EAGER,
    "xglm": _PADDED,
}

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
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or stored.get("load_in_4bit"):
        method = "4 bits" if method == "bitsandbytes" else method
        raise BadInput(
            f"base.model: the weights of {name!r} are stored in {method}, which cannot be read; "
            "save them in 16 bits first (in transformers: model.dequantize(), "
            "model.save_pretrained(folder))"
        )
    for setting, reason in family.refused.items():
        if getattr(config, setting, False):
            raise BadInput(
                f"base.model: {name!r} has {setting}={getattr(config, setting)} in config.json, "
                f"which is not supported ({reason})"
            )
    return family


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
