"""Packed attention for families that do not use transformers' attention interface.

Where a family implements attention in its own module, only the part between the projections is
replaced. Families that pass only an attention mask to their layers get the layout in its place.

Shape letters: T tokens of a packed batch, A attention heads, D head size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.nemotron.modeling_nemotron import NemotronAttention
from transformers.models.stablelm.modeling_stablelm import StableLmAttention

from trainer.model.attention.bucket_layout import Scores
from trainer.model.attention.interface import Layout, attend


class PackedBloomAttention(BloomAttention):
    """Bloom: ALiBi; adds the residual itself."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Any,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, Layout):
            return super().forward(hidden_states, residual, alibi, attention_mask, **more)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        scores = Scores(self.inv_norm_factor, slopes=alibi_slopes(self.num_heads))
        output_1TAD = attend(query, key, value, attention_mask, scores, self.layer_idx)
        return self.dense(output_1TAD.flatten(2)) + residual, None


class PackedFalconAttention(FalconAttention):
    """Falcon: rotary positions or ALiBi, by config; three layouts of the fused QKV projection."""

    def forward(
        self, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Any, **more: Any
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, Layout):
            return super().forward(hidden_states, alibi, attention_mask, **more)
        fused = self.query_key_value(hidden_states)
        query, key, value = (x.transpose(1, 2) for x in self._split_heads(fused))
        scaling = self.inv_norm_factor
        if alibi is None:
            query, key = apply_rotary_pos_emb(query, key, *more["position_embeddings"])
            scores = Scores(scaling)
        else:
            # Falcon was trained with slopes and their products rounded to bfloat16.
            slopes = alibi_slopes(self.num_heads)
            scores = Scores(
                scaling, slopes=slopes, slope_dtype=torch.bfloat16, slope_scaling=scaling
            )
        output_1TAD = attend(query, key, value, attention_mask, scores, self.layer_idx)
        return self.dense(output_1TAD.flatten(2)), None


class _PackedScores(nn.Module):
    """Mixin for attention with a method ``_attn`` between its projections."""

    head_dim: int
    layer_idx: int

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, Layout):
            original: Any = super()
            output: tuple[Tensor, Any] = original._attn(query, key, value, attention_mask)
            return output
        scores = Scores(1 / math.sqrt(self.head_dim))
        output_1TAD = _attend_fp32(query, key, value, attention_mask, scores, self.layer_idx)
        return output_1TAD.transpose(1, 2), None


class PackedGPTJAttention(_PackedScores, GPTJAttention):
    """GPT-J: rotation and projections are not replaced."""


class PackedCodeGenAttention(_PackedScores, CodeGenAttention):
    """CodeGen: rotation and projections are not replaced."""


class PackedGPTNeoAttention(GPTNeoAttention):
    """GPT-Neo: scores are not scaled; every other layer has a window."""

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, Layout):
            return super().forward(hidden_states, layer_past, attention_mask, **more)
        own = self.attention
        query, key, value = (
            own._split_heads(project(hidden_states), own.num_heads, own.head_dim)
            for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        window = own.config.window_size if self.attention_type == "local" else None
        scores = Scores(1.0, window)
        output_1TAD = _attend_fp32(query, key, value, attention_mask, scores, self.layer_id)
        return own.out_proj(output_1TAD.flatten(2)), None


def _attend_fp32(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores, layer: int
) -> Tensor:
    """Attention in fp32, as these families compute it: half precision would overflow."""
    output_1TAD = attend(query.float(), key.float(), value.float(), layout, scores, layer)
    return output_1TAD.to(value.dtype)


#: Attention class that gets the layout in place of the mask -> its replacement.
PACKED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    BloomAttention: PackedBloomAttention,
    CodeGenAttention: PackedCodeGenAttention,
    FalconAttention: PackedFalconAttention,
    GPTJAttention: PackedGPTJAttention,
    GPTNeoAttention: PackedGPTNeoAttention,
    NemotronAttention: NemotronAttention,
    StableLmAttention: StableLmAttention,
}


def replace_attention(model: PreTrainedModel) -> None:
    """Make attention of the classes in ``PACKED_CLASSES`` accept a layout."""
    blocks = []
    for parent in model.modules():
        for child in parent.children():
            packed = PACKED_CLASSES.get(type(child))
            if packed is not None:
                child.__class__ = packed
                blocks.append(parent)
    if not blocks:
        return
    current: list[Layout | None] = [None]

    def take(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current[0] = kwargs.pop("layout", None)
        return args, kwargs

    def hand_down(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Hooks run outside of gradient checkpointing, so a recomputed layer gets the same layout.
        return args, kwargs if current[0] is None else kwargs | {"attention_mask": current[0]}

    model.base_model.register_forward_pre_hook(take, with_kwargs=True)
    for block in blocks:
        block.register_forward_pre_hook(hand_down, with_kwargs=True)


@functools.cache
def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """One per head (arXiv 2108.12409, section 3; the authors' code if A is not a power of two)."""
    closest = 2 ** math.floor(math.log2(num_heads))
    more = range(1, 1 + 2 * (num_heads - closest), 2)
    return (*_powers(closest, range(1, 1 + closest)), *_powers(2 * closest, more))


def _powers(num_heads: int, exponents: range) -> list[float]:
    base = 2 ** -(2 ** -(math.log2(num_heads) - 3))
    return [base**exponent for exponent in exponents]
