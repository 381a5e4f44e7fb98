"""What makes virtual tokens: small trainable modules whose forward takes no input.

An encoder runs once per step, never once per row. After training it is folded into its output.

Shape letters: P virtual tokens, H hidden size of the base, E hidden size of the encoder, L layers,
A heads of keys, D head size, C = A * D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.config import Prompt


class PromptEncoder(nn.Module):
    """Makes the virtual tokens of one prompt.

    Attributes:
        shape: of what it makes: [P, H], or [P, L, 2, A, D] for keys and values per layer.
    """

    shape: torch.Size

    def __init__(self, init: Tensor) -> None:
        super().__init__()
        assert init.dtype == torch.float32, "prompts are trained in fp32 on any base"
        self.shape = init.shape

    def forward(self) -> Tensor:
        """Virtual tokens, fp32, differentiable."""
        raise NotImplementedError


class EmbeddingEncoder(PromptEncoder):
    """The virtual tokens are the parameters.

    Prompt tuning (Lester 2021, arXiv 2104.08691); for keys and values per layer, prefix tuning as
    P-tuning v2 does it (Liu et al. 2021, arXiv 2110.07602).
    """

    def __init__(self, init: Tensor) -> None:
        super().__init__(init)
        self.embedding = nn.Parameter(init.clone())

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
        num_virtual_tokens, hidden_size = init_PH.shape
        # Given weights, the constructor draws none.
        self.embedding = nn.Embedding(num_virtual_tokens, hidden_size, _weight=init_PH.clone())
        self.mlp_head = nn.Sequential(
            _linear(hidden_size, encoder_hidden_size, generator),
            nn.ReLU(),
            _linear(encoder_hidden_size, encoder_hidden_size, generator),
            nn.ReLU(),
            _linear(encoder_hidden_size, hidden_size, generator),
        )

    def forward(self) -> Tensor:
        prompt_PH: Tensor = self.mlp_head(self.embedding.weight)
        return prompt_PH


class PrefixMLPEncoder(PromptEncoder):
    """Prefix tuning: an MLP makes keys and values (Li, Liang 2021, arXiv 2101.00190, section 4.3).

    Parameter names and shapes are those of ``peft.PrefixEncoder`` with ``prefix_projection``, so
    that state dicts go both ways. The last layer starts as the least-squares solution for ``init``,
    which the MLP then makes exactly where E is at least P.

    Args:
        init: keys and values [P, L, 2, A, D] to start from, fp32.
        encoder_hidden_size: E.
        generator: draws the MLP's input and its first layer.
    """

    def __init__(self, init: Tensor, encoder_hidden_size: int, generator: torch.Generator) -> None:
        super().__init__(init)
        num_virtual_tokens, num_layers, _, num_heads, head_size = init.shape
        token_dim = num_heads * head_size
        drawn_PC = torch.randn(num_virtual_tokens, token_dim, generator=generator)
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim, _weight=drawn_PC)
        self.transform = nn.Sequential(
            _linear(token_dim, encoder_hidden_size, generator),
            nn.Tanh(),
            _linear(encoder_hidden_size, num_layers * 2 * token_dim, generator),
        )
        with torch.no_grad():
            hidden_PE = self.transform[:2](self.embedding.weight).double()
            wanted = init.flatten(1).double()
            last: nn.Linear = self.transform[2]  # type: ignore[assignment]
            last.bias.copy_(wanted.mean(0))
            last.weight.copy_((torch.linalg.pinv(hidden_PE) @ (wanted - wanted.mean(0))).T)

    def forward(self) -> Tensor:
        made: Tensor = self.transform(self.embedding.weight)
        return made.view(self.shape)


def make_encoder(
    prompt: Prompt, init: Tensor, generator: torch.Generator, hidden_size: int
) -> PromptEncoder:
    """The encoder that the run file asks for, on the CPU.

    Args:
        init: virtual tokens [P, H], or keys and values [P, L, 2, A, D].
        hidden_size: H, also of an MLP whose size the run file leaves open.
    """
    if prompt.encoder_name == "embedding":
        return EmbeddingEncoder(init)
    assert prompt.encoder_name == "mlp", f"config allows an encoder that nobody wrote: {prompt}"
    encoder = PrefixMLPEncoder if prompt.method == "prefix_tuning" else MLPEncoder
    return encoder(init, prompt.encoder_hidden_size or hidden_size, generator)


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
