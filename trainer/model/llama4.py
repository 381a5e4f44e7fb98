"""Llama 4: experts that scale their input, attention in chunks, and scaled queries.

Shape letters: T tokens, H hidden size, E experts, R experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _default_apply_gate
from transformers.models.llama4.modeling_llama4 import (
    Llama4ForCausalLM,
    Llama4TextAttention,
    Llama4TextExperts,
    Llama4TextMoe,
)


class StackedExperts(Llama4TextExperts):
    """Llama 4's experts with the attributes of transformers' common expert layers."""

    is_transposed = True
    has_gate = True
    _apply_gate = _default_apply_gate


class SparseMoe(Llama4TextMoe):
    """Llama 4's mixture of experts; a token is computed only by the experts chosen for it.

    The score of an expert scales its input. transformers passes zeros to the other experts.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TH = hidden_states.reshape(-1, self.hidden_dim)
        score_TE, logits_TE = self.router(hidden_TH)
        chosen_TR = logits_TE.topk(self.top_k, dim=1).indices
        scaled_TRH = hidden_TH[:, None] * score_TE.gather(1, chosen_TR)[..., None]
        ones = torch.ones_like(chosen_TR, dtype=hidden_TH.dtype)
        routed = self.experts(scaled_TRH.flatten(0, 1), chosen_TR.view(-1, 1), ones.view(-1, 1))
        shared_TH: Tensor = self.shared_expert(hidden_TH)
        return shared_TH + routed.view_as(scaled_TRH).sum(1), logits_TE


def adapt_llama4(model: PreTrainedModel) -> None:
    """Give a Llama 4 the attributes that other models have; change no other model."""
    if not isinstance(model, Llama4ForCausalLM):
        return
    model.base_model_prefix = "model"  # transformers names its place in the container
    for layer in model.base_model.layers:
        attention: Any = layer.self_attn
        chunked = model.config.layer_types[attention.layer_idx] == "chunked_attention"
        attention.attention_chunk = model.config.attention_chunk_size if chunked else None
        moe = layer.feed_forward
        if isinstance(moe, Llama4TextMoe):
            moe.__class__, moe.experts.__class__ = SparseMoe, StackedExperts


def scale_queries(model: PreTrainedModel) -> None:
    """Scale Llama 4's queries by position (arXiv 2501.19399) in layers without rotation.

    transformers counts positions from the start of the tensor, which in packed and padded rows is
    not the start of the row.
    """
    if isinstance(model, Llama4ForCausalLM):
        for layer in model.base_model.layers:
            attention: Any = layer.self_attn
            if attention.attn_temperature_tuning and not attention.use_rope:
                _scale_queries(layer, attention)


def _scale_queries(layer: nn.Module, attention: Llama4TextAttention) -> None:
    attention.attn_temperature_tuning = False
    position_BT: list[Tensor] = []

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        position_BT[:] = [kwargs["position_ids"]]

    def scale(_: nn.Module, __: Any, query: Tensor) -> Tensor:
        count_BT = torch.floor((position_BT[0].float() + 1.0) / attention.floor_scale)
        factor_BT = torch.log1p(count_BT) * attention.attn_scale + 1.0
        return (query * factor_BT[..., None]).to(query.dtype)

    layer.register_forward_pre_hook(note, with_kwargs=True)
    attention.q_proj.register_forward_hook(scale)
