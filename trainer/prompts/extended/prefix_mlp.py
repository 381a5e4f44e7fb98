"""Prefix tuning with an MLP (Li, Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.prompts.encoders import (
    EncoderInputs,
    PromptEncoder,
    output_gain,
    solve_linear,
    uniform_linear,
)


def build(inputs: EncoderInputs) -> PrefixMLPEncoder:
    return PrefixMLPEncoder(inputs.init(), inputs.encoder_hidden_size, inputs.generator)


class PrefixMLPEncoder(PromptEncoder):
    """An MLP that computes keys and values from trained embeddings (section 4.3 of the paper).

    Parameter names and shapes are those of ``peft.PrefixEncoder`` with ``prefix_projection``, so
    state dicts are interchangeable. The last layer is initialized to the least-squares solution for
    ``init``, which is exact if E is at least P.

    Args:
        init: initial keys and values [P, L, 2, A, D], fp32; C = A * D.
        encoder_hidden_size: E.
    """

    def __init__(self, init: Tensor, encoder_hidden_size: int, generator: torch.Generator) -> None:
        super().__init__(init)
        num_virtual_tokens, num_layers, _, num_heads, head_size = init.shape
        token_dim = num_heads * head_size
        drawn_PC = torch.randn(num_virtual_tokens, token_dim, generator=generator)
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim, _weight=drawn_PC)
        self.transform = nn.Sequential(
            uniform_linear(token_dim, encoder_hidden_size, generator),
            nn.Tanh(),
            uniform_linear(encoder_hidden_size, num_layers * 2 * token_dim, generator),
        )
        solve_linear(self.transform[2], self._hidden(), init.flatten(1))

    def scale(self) -> float | Tensor:
        return super().scale() / output_gain(self._hidden())

    def _hidden(self) -> Tensor:
        """Compute the input of the last layer, [P, E]."""
        with torch.no_grad():
            hidden_PE: Tensor = self.transform[:2](self.embedding.weight)
            return hidden_PE

    def forward(self) -> Tensor:
        made: Tensor = self.transform(self.embedding.weight)
        return made.view(self.shape)
