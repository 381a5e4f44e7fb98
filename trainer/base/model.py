"""The base with prompts in front of its rows.

Shape letters: T tokens of a stream, N label positions, H hidden size, P virtual tokens, B rows,
L longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from trainer.base.attention import make_layout
from trainer.base.families import family_of
from trainer.base.padded import pad_rows
from trainer.tasks.streams import Stream


@dataclass
class DecodeStep:
    """One forward of a left-padded batch with a key-value cache.

    Attributes:
        token_ids_BL: the tokens since the last step; on the first, whole rows.
        attention_mask_BT: 1 for every token so far that is no padding, virtual tokens included.
    """

    token_ids_BL: Tensor
    attention_mask_BT: Tensor
    cache: DynamicCache


class PromptedBase(nn.Module):
    """A frozen causal language model that reads virtual tokens in front of word embeddings.

    Attributes:
        packed: rows of a stream are read end to end; otherwise padded, see ``Family.packed``.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.packed = family_of(model.config, model.config.model_type).packed

    @property
    def hidden_size(self) -> int:
        """Of word embeddings and virtual tokens; OPT-350M projects them up behind."""
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def forward(
        self, inputs: Stream | DecodeStep | Tensor, virtual_tokens: Sequence[Tensor]
    ) -> Tensor:
        """Everything goes through one forward, because ZeRO-3 counts steps by it.

        Args:
            inputs: a stream (loss), a decode step (generation), or token ids (word embeddings).
            virtual_tokens: [P, H] of every prompt in the bank; in a decode step, of the one prompt.

        Returns:
            Stream: negative log-likelihood of each label, fp32 [N]. Decode step: logits of the next
            token, fp32 [B, V]. Token ids [n]: word embeddings [n, H].
        """
        if isinstance(inputs, Stream):
            return self._stream_losses(inputs, virtual_tokens)
        if isinstance(inputs, DecodeStep):
            return self._next_logits(inputs, virtual_tokens)
        return self._embed(inputs)

    def _embed(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        return embedded

    def _stream_losses(self, stream: Stream, virtual_tokens: Sequence[Tensor]) -> Tensor:
        words_TH = self._embed(stream.token_ids_T)
        prompts = [virtual_tokens[k].to(self.dtype) for k, _ in stream.prompts]
        num_virtual = sum(prompt.shape[0] for prompt in prompts)
        hidden_TH = torch.cat([*prompts, words_TH[num_virtual:]])
        run = self._packed_logits if self.packed else self._padded_logits
        return cross_entropy(run(stream, hidden_TH).float(), stream.labels_N, reduction="none")

    def _packed_logits(self, stream: Stream, hidden_TH: Tensor) -> Tensor:
        # Logits only where there is a label: the head sees N positions instead of T.
        output: Any = self.model(
            inputs_embeds=hidden_TH[None],
            position_ids=stream.position_ids_T[None],
            logits_to_keep=stream.label_positions_N,
            layout=stream.layout or make_layout(stream.segments, hidden_TH.device),
            use_cache=False,
        )
        logits_NV: Tensor = output.logits[0]
        return logits_NV

    def _padded_logits(self, stream: Stream, hidden_TH: Tensor) -> Tensor:
        rows = pad_rows(stream.segments[len(stream.prompts) :]).to(hidden_TH.device)
        place_N = rows.place_T[stream.label_positions_N]
        # The same: ``logits_to_keep`` would keep the same columns of every row.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0].flatten(0, 1)[place_N][None],)
        )
        try:
            output: Any = self.model(
                inputs_embeds=hidden_TH[rows.token_BL],
                attention_mask=rows.mask_BL,
                position_ids=rows.position_BL,
                use_cache=False,
            )
        finally:
            hook.remove()
        logits_NV: Tensor = output.logits[0]
        return logits_NV

    def _next_logits(self, step: DecodeStep, virtual_tokens: Sequence[Tensor]) -> Tensor:
        words_BLH = self._embed(step.token_ids_BL)
        first = step.cache.get_seq_length() == 0
        if first and virtual_tokens:
            words_BLH = _insert_prompt(words_BLH, step.attention_mask_BT, virtual_tokens[0])
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
