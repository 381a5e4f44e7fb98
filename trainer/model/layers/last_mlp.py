"""The MLP of the last layer, computed only at the positions that the head reads.

After the attention of the last layer, positions no longer depend on each other, and the head reads
only those that predict a label. Elsewhere the MLP's output is zero.

Shape letters: T tokens of a packed batch, U positions that are read, H hidden size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class ReadPositions:
    """Positions whose outputs are read.

    Attributes:
        distinct_U: without repetitions; None: all.
    """

    distinct_U: Tensor | None = None


class LastMLP(nn.Module):
    """Mixed into the class of an MLP."""

    read: ReadPositions

    def forward(self, x_1TH: Tensor) -> Any:
        mlp: Any = super().forward
        position_U = self.read.distinct_U
        if position_U is None:
            return mlp(x_1TH)
        computed = mlp(x_1TH.index_select(1, position_U))
        y_1UH, *scores = (computed,) if isinstance(computed, Tensor) else computed
        y_1TH = torch.zeros_like(x_1TH).index_copy(1, position_U, y_1UH)
        return (y_1TH, *scores) if scores else y_1TH  # with the router's scores in GPT-OSS


def limit_last_mlp(model: nn.Module) -> ReadPositions:
    """Let the caller set the positions that the last layer's MLP computes.

    A module that is not named ``mlp``, or reads more than the hidden states, computes all of them.
    """
    read = ReadPositions()
    layers = getattr(model, "layers", getattr(model, "h", None))
    mlp: Any = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) else None
    if mlp is not None and len(inspect.signature(mlp.forward).parameters) == 1:
        if not isinstance(mlp, LastMLP):
            original: Any = type(mlp)
            mlp.__class__ = _mixed(original)
        mlp.read = read
    return read


@cache
def _mixed(original: Any) -> Any:
    return type(f"Last{original.__name__}", (LastMLP, original), {})
