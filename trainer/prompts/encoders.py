"""What makes virtual tokens: small trainable modules whose forward takes no input.

An encoder runs once per step, never once per row. After training it is folded into its output.

Shape letters: P virtual tokens, H hidden size of the base, E hidden size of the encoder, M MLPs of
an encoder, N tokens of each, L layers, A heads of keys, D head size, C = A * D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config import Prompt

#: Encoders of which only the input starts at ``init``. An LSTM that has learnt nothing makes states
#: that are much alike. Weights that make words of them are so large that first updates undo it.
STARTS_ELSEWHERE = frozenset({"lstm"})


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

    def start_at(self, wanted: Tensor) -> None:
        """Change the start so that these virtual tokens are made of it, as nearly as can be.

        Those that start at ``init`` anyhow need no change.
        """

    def scale(self) -> float:
        """The learning rate at which an update moves what is made by its root mean square.

        Of an optimizer that moves every parameter by about its rate, as Adam does; of an encoder
        that ends in a linear layer, an update of this layer, all of whose weights move alike.
        """
        with torch.no_grad():
            return _root_mean_square(self())


class EmbeddingEncoder(PromptEncoder):
    """The virtual tokens are the parameters.

    Prompt tuning (Lester 2021, arXiv 2104.08691); for keys and values per layer, prefix tuning as
    P-tuning v2 does it (Liu et al. 2021, arXiv 2110.07602).
    """

    def __init__(self, init: Tensor) -> None:
        super().__init__(init)
        self.embedding = nn.Parameter(init.clone())

    def forward(self) -> Tensor:
        # A copy: the optimizer must not change virtual tokens that a caller holds.
        return self.embedding.clone()


class HeadEncoder(PromptEncoder):
    """P-tuning (Liu et al. 2021, arXiv 2103.10385): trainable embeddings, read by an MLP head.

    Parameter names and shapes are those of ``peft.PromptEncoder``, so that state dicts go both
    ways.

    Attributes:
        embedding: starts at ``init`` with a root mean square of 1: word embeddings are often so
            small that the head would hardly tell them apart.
        mlp_head: ends in a linear layer.
    """

    mlp_head: nn.Sequential

    def __init__(self, init_PH: Tensor) -> None:
        super().__init__(init_PH)
        num_virtual_tokens, hidden_size = init_PH.shape
        # Given weights, the constructor draws none.
        read_PH = init_PH / _root_mean_square(init_PH)
        self.embedding = nn.Embedding(num_virtual_tokens, hidden_size, _weight=read_PH)

    def head_input(self) -> Tensor:
        """What the MLP head reads, a row for each virtual token."""
        return self.embedding.weight

    def forward(self) -> Tensor:
        prompt_PH: Tensor = self.mlp_head(self.head_input())
        return prompt_PH

    def start_at(self, wanted: Tensor) -> None:
        # The last layer is solved for it: exact where it has at least P inputs.
        _solve(self.mlp_head[-1], self._hidden(), wanted)

    def scale(self) -> float:
        return super().scale() / _gain(self._hidden())

    def _hidden(self) -> Tensor:
        """What the last layer reads, [P, inputs]."""
        with torch.no_grad():
            hidden_PE: Tensor = self.mlp_head[:-1](self.head_input())
            return hidden_PE


class MLPEncoder(HeadEncoder):
    """An MLP, as PEFT's reparameterization MLP.

    Args:
        init_PH: start of the MLP's input, fp32.
        encoder_hidden_size: E.
        generator: draws the weights of the MLP.
    """

    def __init__(
        self, init_PH: Tensor, encoder_hidden_size: int, generator: torch.Generator
    ) -> None:
        super().__init__(init_PH)
        hidden_size = init_PH.shape[1]
        self.mlp_head = nn.Sequential(
            uniform_linear(hidden_size, encoder_hidden_size, generator),
            nn.ReLU(),
            uniform_linear(encoder_hidden_size, encoder_hidden_size, generator),
            nn.ReLU(),
            uniform_linear(encoder_hidden_size, hidden_size, generator),
        )


class LSTMEncoder(HeadEncoder):
    """A bidirectional LSTM of two layers, then an MLP, as PEFT's reparameterization LSTM.

    Args:
        init_PH: start of the LSTM's input, fp32.
        encoder_hidden_size: E, of each direction.
        generator: draws the weights of LSTM and MLP.
    """

    def __init__(
        self, init_PH: Tensor, encoder_hidden_size: int, generator: torch.Generator
    ) -> None:
        super().__init__(init_PH)
        hidden_size = init_PH.shape[1]
        self.lstm_head = nn.LSTM(
            hidden_size,
            encoder_hidden_size,
            num_layers=2,
            bidirectional=True,
            batch_first=True,
            device="meta",
        ).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in self.lstm_head.parameters():
                parameter.copy_(_uniform(parameter.shape, encoder_hidden_size, generator))
        self.mlp_head = nn.Sequential(
            uniform_linear(encoder_hidden_size * 2, encoder_hidden_size * 2, generator),
            nn.ReLU(),
            uniform_linear(encoder_hidden_size * 2, hidden_size, generator),
        )

    def head_input(self) -> Tensor:
        # cuDNN's LSTM would multiply in TF32, and may sum in another order on every rank.
        with torch.backends.cudnn.flags(enabled=False):
            states_PE: Tensor = self.lstm_head(self.embedding.weight)[0]
        return states_PE


class ResidualEncoder(PromptEncoder):
    """Residual prompt tuning: each embedding plus what a bottleneck MLP makes of it.

    ``embedding + norm(up(relu(down(embedding))))`` with a layer norm (Razdaibiedina et al. 2023,
    arXiv 2305.03937, section 3). The norm's gain starts at zero instead of one, so that training
    starts at ``init``: word embeddings are often far smaller than what a norm of gain one puts out,
    which would drown them.

    Args:
        init_PH: the start, fp32.
        bottleneck_size: E.
        separate: an MLP and a norm for each virtual token (M = P) instead of one for all (M = 1).
        generator: draws the weights of the MLPs.
    """

    def __init__(
        self,
        init_PH: Tensor,
        bottleneck_size: int,
        generator: torch.Generator,
        *,
        separate: bool = False,
    ) -> None:
        super().__init__(init_PH)
        num_virtual_tokens, hidden_size = init_PH.shape
        mlps = num_virtual_tokens if separate else 1
        self.embedding = nn.Parameter(init_PH.clone())

        def linear(ins: int, outs: int) -> tuple[nn.Parameter, nn.Parameter]:
            weight, bias = (_uniform((mlps, n, outs), ins, generator) for n in (ins, 1))
            return nn.Parameter(weight), nn.Parameter(bias)

        self.down, self.down_bias = linear(hidden_size, bottleneck_size)
        self.up, self.up_bias = linear(bottleneck_size, hidden_size)
        self.norm_gain = nn.Parameter(torch.zeros(mlps, 1, hidden_size))
        self.norm_bias = nn.Parameter(torch.zeros(mlps, 1, hidden_size))

    def forward(self) -> Tensor:
        input_MNH = self.embedding.view(len(self.down), -1, self.embedding.shape[1])
        hidden_MNE = torch.baddbmm(self.down_bias, input_MNH, self.down).relu()
        output_MNH = torch.baddbmm(self.up_bias, hidden_MNE, self.up)
        normed_MNH = nn.functional.layer_norm(output_MNH, output_MNH.shape[2:])
        residual_MNH = normed_MNH * self.norm_gain + self.norm_bias
        return self.embedding + residual_MNH.view(self.shape)


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
            uniform_linear(token_dim, encoder_hidden_size, generator),
            nn.Tanh(),
            uniform_linear(encoder_hidden_size, num_layers * 2 * token_dim, generator),
        )
        _solve(self.transform[2], self._hidden(), init.flatten(1))

    def scale(self) -> float:
        return super().scale() / _gain(self._hidden())

    def _hidden(self) -> Tensor:
        """What the last layer reads, [P, E]."""
        with torch.no_grad():
            hidden_PE: Tensor = self.transform[:2](self.embedding.weight)
            return hidden_PE

    def forward(self) -> Tensor:
        made: Tensor = self.transform(self.embedding.weight)
        return made.view(self.shape)


def make_encoder(
    prompt: Prompt, init: Tensor, generator: torch.Generator, hidden_size: int
) -> PromptEncoder:
    """The encoder that the run file asks for, on the CPU.

    Args:
        init: virtual tokens [P, H], or keys and values [P, L, 2, A, D].
        hidden_size: H, also of an MLP whose size the run file leaves open; of the bottleneck of a
            residual one it is a quarter of that.
    """
    encoder = _make(prompt, init, generator, hidden_size)
    if prompt.encoder_name not in STARTS_ELSEWHERE or prompt.init.from_ is not None:
        encoder.start_at(init)
    return encoder


def _make(
    prompt: Prompt, init: Tensor, generator: torch.Generator, hidden_size: int
) -> PromptEncoder:
    size = prompt.encoder_hidden_size
    match prompt.encoder_name:
        case "embedding":
            return EmbeddingEncoder(init)
        case "mlp" if prompt.method == "prefix_tuning":
            return PrefixMLPEncoder(init, size or hidden_size, generator)
        case "mlp":
            return MLPEncoder(init, size or hidden_size, generator)
        case "lstm":
            return LSTMEncoder(init, size or hidden_size, generator)
        case "residual":
            separate = prompt.residual_mlp == "separate"
            bottleneck = size or max(1, hidden_size // 4)
            return ResidualEncoder(init, bottleneck, generator, separate=separate)
    raise AssertionError(f"config allows an encoder that nobody wrote: {prompt}")


def uniform_linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """``nn.Linear`` with torch's own start, from our generator.

    On the meta device torch's constructor leaves the global generator alone.
    """
    linear = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(_uniform((out_features, in_features), in_features, generator))
        linear.bias.copy_(_uniform((out_features,), in_features, generator))
    return linear


def _uniform(shape: Sequence[int], in_features: int, generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(in), 1/sqrt(in)): how torch starts a linear layer."""
    bound = 1 / math.sqrt(in_features)
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _gain(hidden_PE: Tensor) -> float:
    """How far a linear layer's outputs move where all weights and the bias move by one, on average
    over what it reads."""
    return 1.0 + float(hidden_PE.double().abs().sum(1).mean())


def _solve(last: nn.Module, hidden_PE: Tensor, wanted_PC: Tensor) -> None:
    """Let a linear layer make ``wanted`` of ``hidden``: the least-squares solution."""
    assert isinstance(last, nn.Linear), last
    mean_C = wanted_PC.double().mean(0)
    with torch.no_grad():
        last.bias.copy_(mean_C)
        last.weight.copy_((torch.linalg.pinv(hidden_PE.double()) @ (wanted_PC - mean_C)).T)
