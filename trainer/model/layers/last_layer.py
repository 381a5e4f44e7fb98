"""The last layer, whose output is computed only at the positions that the head reads.

The head reads only positions that predict a label. Elsewhere the last layer needs keys and values,
but no queries, no output of its attention and no MLP: these are zero there.

Shape letters: T tokens of a packed batch, U positions that are read, H width of a module's input.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.layers.linear import FrozenLinear

#: Layers of an attention that compute each position on its own, beside those of keys and values.
PROJECTIONS = ("q_proj", "o_proj")


@dataclass
class ReadPositions:
    """Positions whose outputs are read.

    Attributes:
        layer: index of the last layer; None: unknown, and nothing is limited.
        distinct_U: without repetitions; None: all.
    """

    layer: int | None = None
    distinct_U: Tensor | None = None


class OnlyRead(nn.Module):
    """Mixed into the class of a module that computes each position on its own."""

    read: ReadPositions

    def forward(self, x_1TH: Tensor) -> Any:
        compute: Any = super().forward
        position_U = self.read.distinct_U
        if position_U is None:
            return compute(x_1TH)
        computed = compute(x_1TH.index_select(1, position_U))
        y_1UN, *scores = (computed,) if isinstance(computed, Tensor) else computed
        y_1TN = y_1UN.new_zeros(1, x_1TH.shape[1], y_1UN.shape[-1]).index_copy(1, position_U, y_1UN)
        return (y_1TN, *scores) if scores else y_1TN  # with the router's scores in GPT-OSS


def limit_last_layer(model: nn.Module) -> ReadPositions:
    """Let the caller set the positions that the last layer computes.

    An MLP that is not named ``mlp``, or reads more than the hidden states, computes all of them,
    and so do projections that are not named as in Llama.
    """
    layers = getattr(model, "layers", getattr(model, "h", None))
    if not isinstance(layers, nn.ModuleList):
        return ReadPositions()
    read = ReadPositions(len(layers) - 1)
    mlp: Any = getattr(layers[-1], "mlp", None)
    attention = getattr(layers[-1], "self_attn", None)
    projections = [getattr(attention, name, None) for name in PROJECTIONS]
    limited = [mlp] if mlp is not None and len(inspect.signature(mlp.forward).parameters) == 1 else []
    limited += [x for x in projections if isinstance(x, FrozenLinear)]
    for module in limited:
        if not isinstance(module, OnlyRead):
            original: Any = type(module)
            module.__class__ = _mixed(original)
        module.read = read
    return read


@cache
def _mixed(original: Any) -> Any:
    return type(f"Last{original.__name__}", (OnlyRead, original), {})
