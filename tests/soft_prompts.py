"""Soft prompts of tensors that a test draws."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens


def soft_prompts(tensors: Iterable[Tensor]) -> list[SoftPrompt]:
    """Wrap tensors [P, H] as virtual tokens and [P, L, 2, A, D] as keys and values."""
    return [PrefixKeyValues(t) if t.dim() == 5 else VirtualTokens(t) for t in tensors]
