"""The frozen base model with soft prompts before its rows.

Shape letters: T tokens of a packed batch, N label positions, H hidden size, P virtual tokens, B
rows, L longest row, V vocabulary. Keys and values of a prompt: [P, layers, 2, heads, head size].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Mamba2ForCausalLM, PreTrainedModel

from trainer.model.attention.indexing import take
from trainer.model.attention.interface import batch_layout, with_flex, with_past
from trainer.model.attention.padded import pad_rows
from trainer.model.attention.prefix_cache import PastCache
from trainer.model.decode_step import DecodeStep, insert_prompts
from trainer.model.families import context_length, family_of
from trainer.model.layers.end_layers import limit_end_layers
from trainer.model.layers.lm_head import LabelLosses
from trainer.model.per_layer_inputs import id_rules, ids_with_padding, look_up
from trainer.packing.packed_batch import PackedBatch
from trainer.prompts.soft_prompt import SoftPrompt

#: Names of the cache in a model's forward: since transformers 5.24, before, and before in Mamba 2.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")


@dataclass(frozen=True)
class HiddenStatesRequest:
    """Request for the last hidden states at the labels of a packed batch, instead of losses."""

    batch: PackedBatch


@dataclass(frozen=True)
class NextTokenRequest:
    """Request for the logits at the labels of a packed batch, instead of losses."""

    batch: PackedBatch


class ForwardResult(NamedTuple):
    """Output of ``PromptedBase.forward``: the field for the kind of input; the others are None.

    A tuple, because DeepSpeed's hooks find tensors in tuples but not in dataclasses.

    Attributes:
        losses: of the labels of a packed batch.
        hidden_NH: hidden states of a ``HiddenStatesRequest``, [N, H].
        logits_BV: next-token logits of a ``DecodeStep``, fp32 [B, V], or of a ``NextTokenRequest``,
            fp32 [N, V].
        embeddings_TH: embeddings of token ids [T].
    """

    losses: LabelLosses | None = None
    hidden_NH: Tensor | None = None
    logits_BV: Tensor | None = None
    embeddings_TH: Tensor | None = None


class PromptedBase(nn.Module):
    """A frozen causal language model whose rows attend to soft prompts.

    Attributes:
        packed: the family supports packed rows; otherwise rows are padded.
        flex: use FlexAttention for packed batches instead of buckets.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.packed = family_of(model.config, model.config.model_type).packed
        self.flex = False
        self._ends = limit_end_layers(model.base_model)
        self._padding = id_rules(model.config).padding
        self._last_position = context_length(model.config) - 1
        parameters = inspect.signature(model.base_model.forward).parameters
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in parameters), "")

    @property
    def hidden_size(self) -> int:
        """Size of token embeddings and virtual tokens; that of layers may differ (OPT-350M)."""
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def forward(
        self,
        inputs: PackedBatch | HiddenStatesRequest | NextTokenRequest | DecodeStep | Tensor,
        virtual_tokens: Sequence[SoftPrompt],
        teacher_DH: Tensor | None = None,
    ) -> ForwardResult:
        """Run one forward pass. All uses of the base call this method: ZeRO-3 counts its calls.

        Args:
            inputs: a packed batch (losses), a request for hidden states or logits, a decode step
                (logits), or token ids (embeddings).
            virtual_tokens: all prompts of the bank; for a decode step without ``prompt_of`` at most
                one prompt.
            teacher_DH: the teacher's hidden states for the distilled positions of a packed batch.
        """
        self._ends.limit(None, None)
        if isinstance(inputs, PackedBatch):
            return ForwardResult(losses=self._losses(inputs, virtual_tokens, teacher_DH))
        if isinstance(inputs, HiddenStatesRequest):
            return ForwardResult(hidden_NH=self._hidden(inputs.batch, virtual_tokens))
        if isinstance(inputs, NextTokenRequest):
            head: Any = self.model.get_output_embeddings()
            hidden_NH = self._hidden(inputs.batch, virtual_tokens)
            return ForwardResult(logits_BV=head.scaled_logits(hidden_NH))
        if isinstance(inputs, DecodeStep):
            return ForwardResult(logits_BV=self._next_logits(inputs, virtual_tokens))
        return ForwardResult(embeddings_TH=self._embed(inputs))

    def _embed(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        return embedded

    def _losses(
        self, batch: PackedBatch, virtual_tokens: Sequence[SoftPrompt], teacher_DH: Tensor | None
    ) -> LabelLosses:
        # The head gets only the N positions that predict a label.
        hidden_NH = self._hidden(batch, virtual_tokens)
        assert batch.place_N is None or teacher_DH is None, "distilled rows have one target"
        distilled_D = None if teacher_DH is None else batch.distilled_D
        losses: LabelLosses = self.model.get_output_embeddings()(
            hidden_NH, batch.labels_N, teacher_DH, distilled_D, batch.place_N
        )
        return losses

    def _hidden(self, batch: PackedBatch, virtual_tokens: Sequence[SoftPrompt]) -> Tensor:
        """Output of the last layer at the labels, [N, H]; or at the shared positions, [U, H]."""
        words_TH = self._embed(batch.token_ids_T)
        parts, end = [], 0
        for k, positions in batch.prompts:
            parts += [words_TH[end : positions.start], virtual_tokens[k].tensor.to(self.dtype)]
            end = positions.end
        hidden_TH = torch.cat([*(part for part in parts if len(part)), words_TH[end:]])
        past = [virtual_tokens[k].tensor.to(self.dtype) for k, _ in batch.past]
        if past and torch.is_grad_enabled() and not hidden_TH.requires_grad:
            # Makes backward gather the same layers as on a rank with virtual tokens.
            hidden_TH = _Anchored.apply(hidden_TH, past[0])
        ids_T = batch.token_ids_T
        if self._padding is not None:
            ids_T = ids_with_padding(batch, virtual_tokens, self._padding)
        if self.packed:
            return self._packed(batch, hidden_TH, ids_T, past)
        assert not past, "check_prefix_tuning refuses this"
        return self._padded(batch, hidden_TH, ids_T)

    def _packed(
        self, batch: PackedBatch, hidden_TH: Tensor, ids_T: Tensor, past: Sequence[Tensor]
    ) -> Tensor:
        layout = batch.layout or batch_layout(batch, hidden_TH.device)
        layout = with_past(replace(layout, last_layer=self._ends.last), past)
        if self.flex:
            layout = with_flex(layout, batch.segments)
        # also in backward, which may recompute the layers
        self._ends.limit(batch.distinct_U, batch.num_learned)
        output: Any = self.model.base_model(
            inputs_embeds=hidden_TH[None],
            position_ids=batch.position_ids_T[None],
            layout=layout,
            use_cache=False,
            **look_up(self.model, ids_T[None]),
        )
        hidden_NH: Tensor = output.last_hidden_state[0, batch.read_positions]
        return hidden_NH

    def _padded(self, batch: PackedBatch, hidden_TH: Tensor, ids_T: Tensor) -> Tensor:
        """``_packed`` for families that do not support packed rows."""
        rows = pad_rows(batch.segments[batch.first_row :], hidden_TH.device)
        (hidden_BLH,) = take(hidden_TH, [rows.token_BL])
        output: Any = self.model.base_model(
            inputs_embeds=hidden_BLH,
            attention_mask=rows.mask_BL,
            position_ids=rows.position_BL,
            use_cache=False,
            **look_up(self.model, ids_T[rows.token_BL]),
        )
        places = rows.place_T[batch.read_positions]
        hidden_NH: Tensor = output.last_hidden_state.flatten(0, 1)[places]
        return hidden_NH

    def _next_logits(self, step: DecodeStep, virtual_tokens: Sequence[SoftPrompt]) -> Tensor:
        words_BLH = self._embed(step.token_ids_BL)
        words_BLH, ids_BL = insert_prompts(step, virtual_tokens, words_BLH, self._padding)
        # Rows that have ended wait for the others of their batch, and may exceed the context.
        positions_BT = (step.attention_mask_BT.cumsum(1) - 1).clamp(0, self._last_position)
        inputs: dict[str, Any] = {
            "inputs_embeds": words_BLH,
            "attention_mask": step.attention_mask_BT,
            "position_ids": positions_BT[:, -words_BLH.shape[1] :],
            "use_cache": True,
            **look_up(self.model, ids_BL),
        }
        logits_BV: Tensor
        inputs[self._cache_argument] = step.cache
        if isinstance(
            self.model, Mamba2ForCausalLM
        ):  # its own forward reads the weight of the head
            output: Any = self.model.base_model(**inputs)
            logits_BV = self.model.get_output_embeddings()(output.last_hidden_state[:, -1])
        else:
            output = self.model(**inputs, logits_to_keep=1)
            logits_BV = output.logits[:, -1]
        return logits_BV.float()

    def new_cache(self) -> PastCache:
        """Make an empty cache for decode steps."""
        config = self.model.config
        return PastCache(config if family_of(config, config.model_type).recurrent else None)

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Within the context, use transformers' own attention, which decode steps require."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = family_of(config, config.model_type).cached_attention
        # Checkpointed layers are in training mode, in which transformers disables the cache.
        recomputed = [module for module in self.model.modules() if module.training]
        for module in recomputed:
            module.training = False
        try:
            yield
        finally:
            config._attn_implementation = before
            for module in recomputed:
                module.training = True


def read_teacher(
    base: nn.Module, batch: PackedBatch, teachers: Sequence[SoftPrompt]
) -> Tensor | None:
    """Compute the teacher's hidden states [D, H]; None if no rank has distilled positions.

    All ranks run one forward pass without gradient; those without distilled rows, on a padding row.

    Args:
        teachers: token embeddings of every teacher's text.
    """
    if batch.teacher is None:
        return None
    with torch.no_grad():
        hidden_DH: Tensor = base(HiddenStatesRequest(batch.teacher), teachers).hidden_NH
    assert batch.distilled_D is not None
    return hidden_DH[: len(batch.distilled_D)]  # without those of a padding row


class _Anchored(torch.autograd.Function):
    """Make a constant depend on ``anchor``, with a gradient that is always zero, never NaN."""

    @staticmethod
    def forward(ctx: Any, constant: Tensor, anchor: Tensor) -> Tensor:
        ctx.like = anchor.new_zeros(()).expand(anchor.shape)
        return constant.view_as(constant)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        return None, ctx.like
