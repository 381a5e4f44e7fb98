"""Prompt encoders: small trainable modules that produce the values of one prompt.

The forward of an encoder has no input. It runs once per step, not once per row; after training only
the output is exported. ``trainer/config/encoders.py`` registers the encoders.

Shape letters: P virtual tokens, H hidden size of the base, E hidden size of the encoder, L layers,
A key heads, D head size, C output features of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainer.config import Prompt
from trainer.prompts.initializers import Vocabulary

ModuleT = TypeVar("ModuleT", bound=nn.Module)
#: Hidden units that differ between tokens by less than this share of their size count as equal.
EQUAL = 1e-4


@dataclass(frozen=True)
class EncoderInputs:
    """Arguments of an encoder's builder.

    Attributes:
        hidden_size: H.
        generator: random numbers of the prompt, used by ``init`` first and then for weights.
        init: computes the initial values on the CPU, fp32: [P, H], or [P, L, 2, A, D].
        shared_modules: modules that prompts have in common, by ``share``.
    """

    prompt: Prompt
    hidden_size: int
    generator: torch.Generator
    vocabulary: Vocabulary
    init: Callable[[], Tensor]
    shared_modules: dict[str, nn.Module]

    @property
    def encoder_hidden_size(self) -> int:
        return self.prompt.encoder_hidden_size or self.hidden_size

    def shared(self, make: Callable[[], ModuleT]) -> ModuleT:
        """Return the module of the prompt's ``share``, created by the first prompt of the share."""
        if self.prompt.share is None:
            return make()
        if self.prompt.share not in self.shared_modules:
            self.shared_modules[self.prompt.share] = make()
        module: ModuleT = self.shared_modules[self.prompt.share]  # type: ignore[assignment]
        return module


def build_embedding(inputs: EncoderInputs) -> EmbeddingEncoder:
    return EmbeddingEncoder(inputs.init())


def build_mlp(inputs: EncoderInputs) -> MLPEncoder:
    init = inputs.init()
    encoder = MLPEncoder(init, inputs.encoder_hidden_size, inputs.generator)
    encoder.start_at(init)
    return encoder


class PromptEncoder(nn.Module):
    """Produces the values of one prompt.

    Attributes:
        shape: of the output: [P, H], or [P, L, 2, A, D] for keys and values per layer.
        keeps_best_weights: the weights of the best validation are kept, not only the output.
    """

    shape: torch.Size
    keeps_best_weights = False

    def __init__(self, init: Tensor) -> None:
        super().__init__()
        assert init.dtype == torch.float32, "prompts are trained in fp32 on any base"
        self.shape = init.shape

    def forward(self) -> Tensor:
        """Compute the prompt's values, fp32, differentiable."""
        raise NotImplementedError

    def scale(self) -> float | Tensor:
        """Compute the learning rate at which one update moves the output by its root mean square.

        The optimizer is assumed to move every parameter by about its learning rate, as Adam does.
        For an encoder that ends in a linear layer, only the update of that layer counts, and all
        its weights are assumed to move in the same direction.

        For keys and values, the updates of the L layers count together: each layer moves by
        1 / sqrt(L) of the root mean square.

        Returns:
            One number or, for keys and values that are trained themselves, one for the keys and one
            for the values of each layer, [1, L, 2, 1, 1]: they differ in size by up to 60 times.
        """
        num_layers = 1 if len(self.shape) == 2 else self.shape[1]
        with torch.no_grad():
            return _root_mean_square(self()) / math.sqrt(num_layers)


class EmbeddingEncoder(PromptEncoder):
    """The parameters are the values of the prompt.

    Prompt tuning (Lester et al. 2021, arXiv 2104.08691) or, for keys and values per layer, prefix
    tuning as in P-tuning v2 (Liu et al. 2021, arXiv 2110.07602).
    """

    def __init__(self, init: Tensor) -> None:
        super().__init__(init)
        self.embedding = nn.Parameter(init.clone())

    def forward(self) -> Tensor:
        # A copy, so that an update does not change tensors that the caller still uses.
        return self.embedding.clone()

    def scale(self) -> float | Tensor:
        if len(self.shape) == 2:
            return super().scale()
        size_PL2 = self.embedding.detach().square().mean((3, 4)).sqrt()
        # The median, because in many models the first token has keys of a very different size.
        size_L2 = size_PL2.median(0).values / math.sqrt(self.shape[1])
        return size_L2[None, :, :, None, None]


class HeadEncoder(PromptEncoder):
    """P-tuning (Liu et al. 2021, arXiv 2103.10385): trainable embeddings followed by an MLP head.

    Parameter names and shapes are those of ``peft.PromptEncoder``, so state dicts are
    interchangeable.

    Attributes:
        embedding: initially ``init_PH``, scaled to a root mean square of 1: token embeddings are
            often so small that the head would hardly distinguish them.
        mlp_head: ends in a linear layer.
    """

    mlp_head: nn.Sequential

    def __init__(self, init_PH: Tensor) -> None:
        super().__init__(init_PH)
        num_virtual_tokens, hidden_size = init_PH.shape
        # With _weight, the constructor does not use the global generator.
        scaled_PH = init_PH / _root_mean_square(init_PH)
        self.embedding = nn.Embedding(num_virtual_tokens, hidden_size, _weight=scaled_PH)

    def head_input(self) -> Tensor:
        """Return the input of the MLP head, [P, inputs]."""
        return self.embedding.weight

    def forward(self) -> Tensor:
        prompt_PH: Tensor = self.mlp_head(self.head_input())
        return prompt_PH

    def start_at(self, target_PH: Tensor) -> None:
        """Fit the last layer to these virtual tokens; exact if the layer has at least P inputs."""
        solve_linear(self.mlp_head[-1], self._hidden(), target_PH)

    def scale(self) -> float | Tensor:
        return super().scale() / output_gain(self._hidden())

    def _hidden(self) -> Tensor:
        """Compute the input of the last layer, [P, inputs]."""
        with torch.no_grad():
            hidden_PE: Tensor = self.mlp_head[:-1](self.head_input())
            return hidden_PE


class MLPEncoder(HeadEncoder):
    """An MLP of three layers, as in PEFT (``EncoderReparameterizationType.MLP``)."""

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
        self._standardize()

    @torch.no_grad()
    def _standardize(self) -> None:
        """Standardize the hidden units over the virtual tokens (arXiv 1602.07868, section 3).

        With torch's initialization, the hidden units of all tokens are nearly equal: an update
        would move all virtual tokens alike, hardly in the direction of their gradients. Tokens
        that are equal, such as a single one, have nothing to standardize.
        """
        hidden_PE = self.embedding.weight
        layers = list(self.mlp_head)
        for layer, activation in zip(layers[:-1:2], layers[1::2], strict=True):
            assert isinstance(layer, nn.Linear), layer
            drawn_PE = hidden_PE @ layer.weight.T
            mean_E = drawn_PE.mean(0)
            deviation = _root_mean_square(drawn_PE - mean_E)
            if deviation < EQUAL * _root_mean_square(drawn_PE):
                return
            layer.weight.div_(deviation)
            layer.bias.sub_(mean_E / deviation)
            hidden_PE = activation(layer(hidden_PE))


def uniform_linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """Create an ``nn.Linear`` with torch's initialization, drawn from ``generator``."""
    # On the meta device, torch's constructor does not use the global generator.
    linear = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(uniform((out_features, in_features), in_features, generator))
        linear.bias.copy_(uniform((out_features,), in_features, generator))
    return linear


def uniform(shape: Sequence[int], in_features: int, generator: torch.Generator) -> Tensor:
    """Draw from U(-1/sqrt(in), 1/sqrt(in)), torch's initialization of a linear layer."""
    bound = 1 / math.sqrt(in_features)
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def output_gain(hidden_PE: Tensor) -> float:
    """Return how far a linear layer's outputs move if all weights and the bias move by 1.

    The result is the mean over the layer's inputs [P, E].
    """
    return 1.0 + float(hidden_PE.double().abs().sum(1).mean())


def solve_linear(last: nn.Module, hidden_PE: Tensor, target_PC: Tensor) -> None:
    """Set a linear layer to the least-squares solution of ``layer(hidden) = target``."""
    assert isinstance(last, nn.Linear), last
    mean_C = target_PC.double().mean(0)
    with torch.no_grad():
        last.bias.copy_(mean_C)
        last.weight.copy_((torch.linalg.pinv(hidden_PE.double()) @ (target_PC - mean_C)).T)
