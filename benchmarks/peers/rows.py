"""Rows and initial prompt that all arms train with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MEDIAN, SIGMA, SHORTEST, LONGEST = 60, 0.85, 8, 512
#: Number of labels of a row: a short answer after a text, as is typical of prompt tuning.
ANSWER = 6


@dataclass(frozen=True)
class Row:
    """Token ids, of which the last ``ANSWER`` are labels."""

    input_ids: list[int]

    @property
    def labels(self) -> list[int]:
        first = len(self.input_ids) - ANSWER
        return [-100] * first + self.input_ids[first:]


def make_rows(count: int, vocab_size: int, *, equal: bool = False, seed: int = 0) -> list[Row]:
    """Return rows of random tokens with log-normal lengths, or all of the median length."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(count).log_normal_(math.log(MEDIAN), SIGMA, generator=generator)
    lengths = drawn.round().long().clamp(SHORTEST, LONGEST)
    if equal:
        lengths = torch.full_like(lengths, MEDIAN)
    return [
        Row(torch.randint(3, vocab_size, (int(n),), generator=generator).tolist()) for n in lengths
    ]


def initial_prompt(num_virtual_tokens: int, hidden_size: int) -> torch.Tensor:
    """Return an initial prompt [P, H] in fp32, scaled like the base model's token embeddings."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_virtual_tokens, hidden_size, generator=generator) * 0.1
