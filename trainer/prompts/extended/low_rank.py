"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.prompts.encoders import EncoderInputs, PromptEncoder


def build(inputs: EncoderInputs) -> LowRankEncoder:
    """Build the encoder of one task, with the prompt of its share."""
    shared = inputs.shared(lambda: SharedPrompt(inputs.init()))
    # The matrix must not depend on which prompt of the share drew the shared prompt.
    inputs.generator.manual_seed(inputs.generator.initial_seed())
    return LowRankEncoder(shared, inputs.prompt.rank, inputs.generator)


class SharedPrompt(nn.Module):
    """A prompt [P, H] that several tasks have in common."""

    def __init__(self, init_PH: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(init_PH.clone())


class LowRankEncoder(PromptEncoder):
    """A shared prompt times a low-rank matrix per task: ``shared * (columns @ rows)``, elementwise.

    The paper (section 3.1) uses rank 1 and distills the shared prompt from trained prompts. Here
    the matrix is initialized to ones, so every task begins with the shared prompt.

    Args:
        generator: draws the columns of the second and further ranks.
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
