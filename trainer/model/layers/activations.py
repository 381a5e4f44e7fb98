"""Gated activations and their derivatives, for loops that ``torch.compile`` fuses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

#: Activations with a hand-written derivative, by the class that transformers implements them with.
ACTIVATIONS: dict[type[nn.Module], str] = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["gelu"]): "gelu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
}


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``act(gate) * up``; ``kind`` is a value of ``ACTIVATIONS``."""
    return _act(gate, kind) * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate`` and ``up``."""
    return _act_backward(grad * up, gate, kind), grad * _act(gate, kind)


def _act(gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def _act_backward(grad: Tensor, gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        of_gate: Tensor = torch.ops.aten.silu_backward(grad, gate)
        return of_gate
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    of_gate = torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)
    return of_gate
