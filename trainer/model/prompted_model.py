"""The base with prompts in front of its rows.

Shape letters: T tokens of a packed batch, N label positions, H hidden size, P virtual tokens, B
rows, L longest row, V vocabulary. Keys and values of a prompt: [P, layers, 2, heads, head size].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.attention.interface import make_layout, with_flex, with_past
from trainer.model.attention.padded import pad_rows
from trainer.model.attention.prefix_cache import PastCache
from trainer.model.families import family_of
from trainer.packing.packed_batch import PackedBatch
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt


@dataclass(frozen=True)
class HiddenStatesRequest:
    """A packed batch of which the last hidden states at the labels are returned, not the losses."""

    batch: PackedBatch


@dataclass
class DecodeStep:
    """One forward of a left-padded batch with a key-value cache.

    Attributes:
        token_ids_BL: the tokens since the last step; on the first, whole rows.
        attention_mask_BT: 1 for every token so far that is no padding, virtual tokens included.
    """

    token_ids_BL: Tensor
    attention_mask_BT: Tensor
    cache: PastCache


class PromptedBase(nn.Module):
    """A frozen causal language model that reads virtual tokens in front of word embeddings.

    Attributes:
        packed: rows of a packed batch are read end to end; otherwise padded, see ``Family.packed``.
        flex: packed batches attend by FlexAttention instead of buckets.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.packed = family_of(model.config, model.config.model_type).packed
        self.flex = False

    @property
    def hidden_size(self) -> int:
        """Of word embeddings and virtual tokens; OPT-350M projects them up behind."""
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def forward(
        self,
        inputs: PackedBatch | HiddenStatesRequest | DecodeStep | Tensor,
        virtual_tokens: Sequence[SoftPrompt],
        teacher_DH: Tensor | None = None,
    ) -> Tensor:
        """Everything goes through one forward, because ZeRO-3 counts steps by it.

        Args:
            inputs: a packed batch (loss), a reading (hidden states), a decode step (generation), or
                token ids (word embeddings).
            virtual_tokens: [P, H] of every prompt in the bank, or its keys and values; in a decode
                step, of the one prompt.
            teacher_DH: hidden states that the packed batch's distilled positions learn from.

        Returns:
            Packed batch: negative log-likelihood of each label, fp32 [N]; with a teacher [2, N],
            see ``taught_losses``. Reading: [N, H]. Decode step: logits of the next token, fp32
            [B, V]. Token ids [n]: word embeddings [n, H].
        """
        if isinstance(inputs, PackedBatch):
            return self._batch_losses(inputs, virtual_tokens, teacher_DH)
        if isinstance(inputs, HiddenStatesRequest):
            return self._hidden(inputs.batch, virtual_tokens)
        if isinstance(inputs, DecodeStep):
            return self._next_logits(inputs, virtual_tokens)
        return self._embed(inputs)

    def _embed(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        return embedded

    def _batch_losses(
        self, batch: PackedBatch, virtual_tokens: Sequence[SoftPrompt], teacher_DH: Tensor | None
    ) -> Tensor:
        hidden_NH = self._hidden(batch, virtual_tokens)
        # Logits only where there is a label: the head sees N positions instead of T.
        head: Any = self.model.get_output_embeddings()
        if batch.shared is not None:
            assert teacher_DH is None, "rows with a teacher are read with one target"
            losses = head(hidden_NH, batch.labels_N, place_N=batch.shared.place_N)
        elif teacher_DH is None:
            losses = head(hidden_NH, batch.labels_N)
        else:
            losses = head(hidden_NH, batch.labels_N, teacher_DH, batch.distilled_D)
        return losses.loss_N if losses.agrees_N is None else torch.stack(losses)

    def _hidden(self, batch: PackedBatch, virtual_tokens: Sequence[SoftPrompt]) -> Tensor:
        """Output of the last layer at the labels, [N, H]; or at the shared positions, [U, H]."""
        words_TH = self._embed(batch.token_ids_T)
        prompts = [virtual_tokens[k].tensor.to(self.dtype) for k, _ in batch.prompts]
        num_virtual = sum(prompt.shape[0] for prompt in prompts)
        hidden_TH = torch.cat([*prompts, words_TH[num_virtual:]])
        past = [virtual_tokens[k].tensor.to(self.dtype) for k, _ in batch.past]
        if past and torch.is_grad_enabled() and not hidden_TH.requires_grad:
            # Backward then gathers the same layers as on a rank whose packed batch has virtual
            # tokens.
            hidden_TH = _Anchored.apply(hidden_TH, past[0])
        if self.packed:
            return self._packed(batch, hidden_TH, past)
        assert not past, "check_prefix_tuning refuses this"
        return self._padded(batch, hidden_TH)

    def _packed(self, batch: PackedBatch, hidden_TH: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Output of the last layer at the labels, [N, H]; or at the shared positions, [U, H]."""
        layout = with_past(batch.layout or make_layout(batch.segments, hidden_TH.device), past)
        if self.flex:
            layout = with_flex(layout, batch.segments)
        output: Any = self.model.base_model(
            inputs_embeds=hidden_TH[None],
            position_ids=batch.position_ids_T[None],
            layout=layout,
            use_cache=False,
        )
        shared = batch.shared
        positions = batch.label_positions_N if shared is None else shared.position_U
        hidden_NH: Tensor = output.last_hidden_state[0, positions]
        return hidden_NH

    def _padded(self, batch: PackedBatch, hidden_TH: Tensor) -> Tensor:
        """The same for a family that cannot read packed rows."""
        rows = pad_rows(batch.segments[len(batch.prompts) :], hidden_TH.device)
        output: Any = self.model.base_model(
            inputs_embeds=hidden_TH[rows.token_BL],
            attention_mask=rows.mask_BL,
            position_ids=rows.position_BL,
            use_cache=False,
        )
        place_N = rows.place_T[batch.label_positions_N]
        hidden_NH: Tensor = output.last_hidden_state.flatten(0, 1)[place_N]
        return hidden_NH

    def _next_logits(self, step: DecodeStep, virtual_tokens: Sequence[SoftPrompt]) -> Tensor:
        words_BLH = self._embed(step.token_ids_BL)
        first = step.cache.get_seq_length() == 0
        if first and virtual_tokens:
            soft_prompt = virtual_tokens[0]
            prompt = soft_prompt.tensor
            if isinstance(soft_prompt, PrefixKeyValues):
                pads_B = (step.attention_mask_BT == 0).sum(1)
                step.cache.place(prompt.to(self.dtype), pads_B)
                prompt = words_BLH.new_zeros(len(prompt), words_BLH.shape[2])
            words_BLH = _insert_prompt(words_BLH, step.attention_mask_BT, prompt)
        positions_BT = (step.attention_mask_BT.cumsum(1) - 1).clamp(min=0)
        output: Any = self.model(
            inputs_embeds=words_BLH,
            attention_mask=step.attention_mask_BT,
            position_ids=positions_BT[:, -words_BLH.shape[1] :],
            past_key_values=step.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Inside, the model attends as transformers does by itself: for decode steps."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = family_of(config, config.model_type).cached_attention
        # A layer that is in training mode, to be recomputed, would forget the cache.
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
    """What the packed batch's distilled positions learn from, [D, H]; None if no rank has any.

    A forward without gradient, made by all ranks alike: a rank without such rows reads a padding
    row.

    Args:
        teachers: word embeddings of every teacher's text, [tokens, H].
    """
    if batch.teacher is None:
        return None
    with torch.no_grad():
        hidden_DH: Tensor = base(HiddenStatesRequest(batch.teacher), teachers)
    assert batch.distilled_D is not None
    return hidden_DH[: len(batch.distilled_D)]  # none of a padding row's


class _Anchored(torch.autograd.Function):
    """A constant that counts as a function of ``anchor``, with a gradient of zero, never NaN."""

    @staticmethod
    def forward(ctx: Any, constant: Tensor, anchor: Tensor) -> Tensor:
        ctx.like = anchor.new_zeros(()).expand(anchor.shape)
        return constant.view_as(constant)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        return None, ctx.like


def _insert_prompt(words_BLH: Tensor, mask_BT: Tensor, prompt_PH: Tensor) -> Tensor:
    """Put the prompt right in front of each row's text, behind its padding: [B, P + L, H].

    The mask already counts the P virtual tokens: row b has ``T - sum(mask_b)`` pads.
    """
    num_virtual = prompt_PH.shape[0]
    prompt_PH = prompt_PH.to(words_BLH.dtype)
    rows = []
    for words_LH, mask_T in zip(words_BLH, mask_BT, strict=True):
        pads = int((mask_T == 0).sum())
        rows.append(torch.cat([words_LH[:pads], prompt_PH, words_LH[pads:]]))
    stacked = torch.stack(rows)
    assert stacked.shape[1] == words_BLH.shape[1] + num_virtual
    return stacked
