"""What makes virtual tokens: small trainable modules whose forward takes no input.

An encoder runs once per step, never once per row. After training it is folded into its output.

Shape letters: P virtual tokens, H hidden size of the base, E hidden size of the encoder.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.config import Prompt


class PromptEncoder(nn.Module):
    """Makes the virtual tokens of one prompt.

    Attributes:
        num_virtual_tokens: P.
        hidden_size: H.
    """

    num_virtual_tokens: int
    hidden_size: int

    def __init__(self, init_PH: Tensor) -> None:
        super().__init__()
        assert init_PH.dtype == torch.float32, "prompts are trained in fp32 on any base"
        self.num_virtual_tokens, self.hidden_size = init_PH.shape

    def forward(self) -> Tensor:
        """Virtual tokens, fp32 [P, H], differentiable."""
        raise NotImplementedError


class EmbeddingEncoder(PromptEncoder):
    """Prompt tuning: the virtual tokens are the parameters (Lester 2021, arXiv 2104.08691)."""

    def __init__(self, init_PH: Tensor) -> None:
        super().__init__(init_PH)
        self.embedding = nn.Parameter(init_PH.clone())

    def forward(self) -> Tensor:
        # A copy: whoever holds the virtual tokens must not see the optimizer change them.
        return self.embedding.clone()


class MLPEncoder(PromptEncoder):
    """P-tuning: an MLP over trainable embeddings (Liu et al. 2021, arXiv 2103.10385).

    Parameter names and shapes are those of ``peft.PromptEncoder`` with reparameterization MLP, so
    that state dicts go both ways.

    Args:
        init_PH: start of the MLP's input, fp32.
        encoder_hidden_size: E.
        generator: draws the weights of the MLP.
    """

    def __init__(
        self, init_PH: Tensor, encoder_hidden_size: int, generator: torch.Generator
    ) -> None:
        super().__init__(init_PH)
        # Given weights, the constructor draws none.
        self.embedding = nn.Embedding(
            self.num_virtual_tokens, self.hidden_size, _weight=init_PH.clone()
        )
        self.mlp_head = nn.Sequential(
            _linear(self.hidden_size, encoder_hidden_size, generator),
            nn.ReLU(),
            _linear(encoder_hidden_size, encoder_hidden_size, generator),
            nn.ReLU(),
            _linear(encoder_hidden_size, self.hidden_size, generator),
        )

    def forward(self) -> Tensor:
        prompt_PH: Tensor = self.mlp_head(self.embedding.weight)
        return prompt_PH


def make_encoder(prompt: Prompt, init_PH: Tensor, generator: torch.Generator) -> PromptEncoder:
    """The encoder that the run file asks for, on the CPU."""
    if prompt.encoder_name == "embedding":
        return EmbeddingEncoder(init_PH)
    assert prompt.encoder_name == "mlp", f"config allows an encoder that nobody wrote: {prompt}"
    return MLPEncoder(init_PH, prompt.encoder_hidden_size or init_PH.shape[1], generator)


def _linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """``nn.Linear`` with torch's own start, U(-1/sqrt(in), 1/sqrt(in)), from our generator.

    On the meta device torch's constructor leaves the global generator alone.
    """
    linear = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(in_features)
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)
    return linear
