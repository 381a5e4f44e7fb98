"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.prompts.encoders import EncoderInputs, PromptEncoder


def build(inputs: EncoderInputs) -> LowRankEncoder:
    """Build the encoder of one task around the prompt of its share."""
    shared = inputs.shared(lambda: SharedPrompt(inputs.init()))
    # The matrix must not depend on whether this prompt or another one drew the shared prompt.
    inputs.generator.manual_seed(inputs.generator.initial_seed())
    return LowRankEncoder(shared, inputs.prompt.rank, inputs.generator)


class SharedPrompt(nn.Module):
    """A soft prompt [P, H] that several tasks have in common."""

    def __init__(self, init_PH: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(init_PH.clone())


class LowRankEncoder(PromptEncoder):
    """Multitask prompt tuning: a shared prompt, times a low-rank matrix of the task's own.

    ``shared * (columns @ rows)``, element by element (Wang et al. 2023, arXiv 2303.02861, section
    3.1; there of rank 1). The product starts as ones, so that every task starts at the shared
    prompt, which the paper distils from trained ones and then multiplies by it.

    Args:
        generator: draws what tells the further ranks apart.
    """

    def __init__(self, shared: SharedPrompt, rank: int, generator: torch.Generator) -> None:
        init_PH = shared.embedding.detach()
        super().__init__(init_PH)
        self.shared = shared
        columns = torch.randn(init_PH.shape[0], rank, generator=generator)
        columns[:, 0] = 1.0
        rows = torch.zeros(rank, init_PH.shape[1])
        rows[0] = 1.0
        self.columns, self.rows = nn.Parameter(columns), nn.Parameter(rows)

    def forward(self) -> Tensor:
        return self.shared.embedding * (self.columns @ self.rows)
