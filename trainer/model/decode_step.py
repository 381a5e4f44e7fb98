"""One forward pass of decoding: its inputs, and the prompts of its rows.

Shape letters: B rows, L tokens since the last step, T tokens so far, P virtual tokens, H hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.attention.batch_cache import BatchCache
from trainer.model.attention.prefix_cache import PastCache
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt


@dataclass
class DecodeStep:
    """One forward of a left-padded batch with a key-value cache.

    Attributes:
        token_ids_BL: the tokens since the last step; in the first step, the full rows.
        attention_mask_BT: 1 for every token so far, virtual tokens included; 0 for padding.
        prompt_at: for each row, the number of its tokens before the virtual tokens.
        prompt_of: in the first step of rows with different prompts, the index of each row's prompt
            in ``virtual_tokens``, or None; empty: all rows have the only prompt, if any.
    """

    token_ids_BL: Tensor
    attention_mask_BT: Tensor
    cache: PastCache | BatchCache
    prompt_at: Sequence[int] = ()
    prompt_of: Sequence[int | None] = ()


def insert_prompts(
    step: DecodeStep, virtual_tokens: Sequence[SoftPrompt], words_BLH: Tensor, padding: int | None
) -> tuple[Tensor, Tensor]:
    """Insert the virtual tokens of each row in the first step, and pass prefixes to the cache.

    Args:
        words_BLH: embeddings of the step's tokens.
        padding: id at the positions of virtual tokens, for layers that read ids; None: none do.

    Returns:
        Embeddings [B, T, H] in the first step, and the ids for layers that read them. A later step
        is returned unchanged.
    """
    ids_BL, mask_BT = step.token_ids_BL, step.attention_mask_BT
    prompts = _prompts_of_rows(step, virtual_tokens)
    if not prompts:
        return words_BLH, ids_BL
    inserted, places = [], list(step.prompt_at or [0] * len(prompts))
    for row, prompt in enumerate(prompts):
        num_virtual = 0 if prompt is None else prompt.num_virtual_tokens
        tensor = words_BLH.new_zeros(num_virtual, words_BLH.shape[2])
        if isinstance(prompt, PrefixKeyValues):
            places[row] = 0  # keys and values precede all tokens
        elif prompt is not None:
            tensor = prompt.tensor.to(words_BLH.dtype)
        inserted.append(tensor)
    _place_prefixes(step, prompts, words_BLH.dtype)
    words_BTH = _with_prompts(words_BLH, mask_BT, inserted, places)
    if padding is None:
        return words_BTH, ids_BL
    pads = [ids_BL.new_full((len(tensor), 1), padding) for tensor in inserted]
    return words_BTH, _with_prompts(ids_BL[..., None], mask_BT, pads, places)[..., 0]


def _prompts_of_rows(
    step: DecodeStep, virtual_tokens: Sequence[SoftPrompt]
) -> list[SoftPrompt | None]:
    """Return the prompt of each row in the first step; later, and without prompts, nothing."""
    rows, length = step.token_ids_BL.shape
    if step.prompt_of:
        return [None if k is None else virtual_tokens[k] for k in step.prompt_of]
    num_virtual = sum(prompt.num_virtual_tokens for prompt in virtual_tokens)
    if virtual_tokens and step.attention_mask_BT.shape[1] == length + num_virtual:
        return [virtual_tokens[0]] * rows
    return []


def _place_prefixes(
    step: DecodeStep, prompts: Sequence[SoftPrompt | None], dtype: torch.dtype
) -> None:
    """Pass the keys and values of prefixes to the cache, each with the rows that read it."""
    pads_B = (step.attention_mask_BT == 0).sum(1)
    for prefix in dict.fromkeys(p for p in prompts if isinstance(p, PrefixKeyValues)):
        rows = [row for row, prompt in enumerate(prompts) if prompt is prefix]
        rows_B = torch.tensor(rows, device=pads_B.device)
        assert isinstance(step.cache, PastCache)
        step.cache.place(prefix.tensor.to(dtype), pads_B[rows_B], rows_B)


def _with_prompts(
    words_BLH: Tensor, mask_BT: Tensor, prompts: Sequence[Tensor], prompt_at: Sequence[int]
) -> Tensor:
    """Insert each row's prompt [P, H] after its padding and ``prompt_at`` tokens: [B, T, H].

    The mask already counts the P virtual tokens: row b has ``T - sum(mask_b)`` padding tokens.
    """
    width, length = mask_BT.shape[1], words_BLH.shape[1]
    pads_B: list[int] = (mask_BT == 0).sum(1).tolist()
    rows = []
    for words_LH, pads, prompt_PH, at in zip(words_BLH, pads_B, prompts, prompt_at, strict=True):
        text_LH = words_LH[length - (width - pads - len(prompt_PH)) :]
        padding = words_BLH.new_zeros(pads, words_BLH.shape[2])
        rows.append(torch.cat([padding, text_LH[:at], prompt_PH, text_LH[at:]]))
    return torch.stack(rows)
