"""The first and the last layer, which compute less than those between them.

The head reads only positions that predict a label. Elsewhere the last layer needs keys and values,
but no queries, no output of its attention and no MLP: these are zero there.

Embeddings of text are constant. In the first layer, queries, keys and values of text after the
prompts therefore have no backward.

Shape letters: T tokens of a packed batch, U positions that are read, H width of a module's input, N
of its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.layers.linear import FrozenLinear

#: Layers of attention that read the hidden states, and all that compute each position on its own.
READ_HIDDEN = ("q_proj", "k_proj", "v_proj", "qkv_proj")
ONLY_READ = ("q_proj", "o_proj")


@dataclass
class Halved:
    """An input of the first layer, its halves, and the number of products that will read them."""

    input: Tensor
    halves: tuple[Tensor, Tensor]
    readers_left: int


@dataclass
class EndLayers:
    """What the first and the last layer compute.

    Attributes:
        last: index of the last layer; None: unknown, and nothing is limited.
        read_U: distinct positions whose outputs are read; None: all.
        num_learned: number of the first positions, after which all embeddings are constant; None:
            any embedding may have a gradient.
        readers: number of products of the first layer that share an input.
    """

    last: int | None = None
    read_U: Tensor | None = None
    num_learned: int | None = None
    readers: int = 0
    _halved: Halved | None = field(default=None, repr=False)

    def limit(self, read_U: Tensor | None, num_learned: int | None) -> None:
        """Set the limits of the next pass and its backward."""
        self.read_U, self.num_learned = read_U, num_learned
        self._halved = None

    def halves(self, x_1TH: Tensor) -> tuple[Tensor, Tensor]:
        """The positions with and without a gradient, the same tensors for all readers."""
        halved = self._halved
        if halved is None or halved.input is not x_1TH:
            assert self.num_learned is not None
            n = max(1, self.num_learned)  # all ranks have a backward of the same products
            halved = Halved(x_1TH, (x_1TH[:, :n], x_1TH[:, n:].detach()), self.readers)
        halved.readers_left -= 1
        self._halved = halved if halved.readers_left else None
        return halved.halves


class OnlyRead(nn.Module):
    """Mixed into the class of a module of the last layer that computes each position on its own."""

    ends: EndLayers

    def forward(self, x_1TH: Tensor) -> Any:
        compute: Any = super().forward
        read_U = self.ends.read_U
        if read_U is None:
            return compute(x_1TH)
        computed = compute(x_1TH.index_select(1, read_U))
        y_1UN, *scores = (computed,) if isinstance(computed, Tensor) else computed
        y_1TN = y_1UN.new_zeros(1, x_1TH.shape[1], y_1UN.shape[-1]).index_copy(1, read_U, y_1UN)
        return (y_1TN, *scores) if scores else y_1TN  # with the router's scores in GPT-OSS


class OnlyLearned(nn.Module):
    """Mixed into the class of a product of the first layer."""

    ends: EndLayers

    def forward(self, x_1TH: Tensor) -> Tensor:
        compute: Any = super().forward
        y_1TN: Tensor
        if self.ends.num_learned is None or not x_1TH.requires_grad:
            y_1TN = compute(x_1TH)
        else:
            y_1TN = torch.cat([compute(half) for half in self.ends.halves(x_1TH)], 1)
        return y_1TN


def limit_end_layers(model: nn.Module) -> EndLayers:
    """Let the caller limit what the first and the last layer compute.

    An MLP that is not named ``mlp``, or reads more than the hidden states, computes all positions,
    and so do products of attention that are not named as in Llama.
    """
    layers = getattr(model, "layers", getattr(model, "h", None))
    if not isinstance(layers, nn.ModuleList):
        return EndLayers()
    ends = EndLayers(len(layers) - 1)
    mlp: Any = getattr(layers[-1], "mlp", None)
    if mlp is not None and len(inspect.signature(mlp.forward).parameters) == 1:
        _mix(OnlyRead, mlp, ends)
    _limit_products(layers[-1], OnlyRead, ONLY_READ, ends)
    if len(layers) > 1:
        ends.readers = _limit_products(layers[0], OnlyLearned, READ_HIDDEN, ends)
    return ends


def _limit_products(layer: nn.Module, kind: Any, names: Sequence[str], ends: EndLayers) -> int:
    """Limit the layer's products with these names; return their number."""
    attention = getattr(layer, "self_attn", None)
    products = [getattr(attention, name, None) for name in names]
    limited = [product for product in products if isinstance(product, FrozenLinear)]
    for product in limited:
        _mix(kind, product, ends)
    return len(limited)


def _mix(kind: Any, module: Any, ends: EndLayers) -> None:
    original: Any = type(module)
    if not isinstance(module, kind):
        module.__class__ = _mixed(kind, original)
    module.ends = ends


@cache
def _mixed(kind: Any, original: Any) -> Any:
    return type(f"{kind.__name__}{original.__name__}", (kind, original), {})
