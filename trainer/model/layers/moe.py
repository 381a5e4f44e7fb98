"""Frozen mixture-of-experts layers, with the matrices of all experts in one stacked parameter.

Tokens are sorted by expert, each expert multiplies all its tokens at once, and the results are put
back in token order. Each layer synchronizes with the device once and sums in a deterministic order.

Shape letters: T tokens, E experts, R experts per token, I intermediate size, H hidden size,
N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.layers.fused_ops import fused_gate
from trainer.model.layers.int8_matmul import frozen_matmul
from trainer.model.layers.linear import absmax_name
from trainer.model.layers.quantization import INT8_MAX


def is_experts(module: nn.Module) -> bool:
    """Whether a module is transformers' stacked experts (``use_experts_implementation``)."""
    return hasattr(module, "is_transposed") and hasattr(module, "down_proj")


class FrozenExperts(nn.Module):
    """All experts of one layer, with the signature of transformers' experts.

    Attributes:
        gate_up_proj, down_proj: Parameters [E, 2 I, H] and [E, H, I], int8 or float. Experts
            without gate (Nemotron-H) have ``up_proj``, [E, I, H].
        gate_up_proj_absmax, down_proj_absmax: fp32 buffers [E, 2 I] and [E, H] if int8.
        transposed: names of parameters that the checkpoint stores as [E, K, N].
    """

    def __init__(self, experts: Any, quantized: bool) -> None:
        super().__init__()
        gated = getattr(experts, "has_gate", True)
        self._apply_gate: Callable[[Tensor], Tensor] = (
            fused_gate(experts) or experts._apply_gate if gated else experts.act_fn
        )
        self._up = "gate_up_proj" if gated else "up_proj"
        matrices = (self._up, "down_proj")
        self.num_experts: int = experts.down_proj.shape[0]
        self.transposed = frozenset(matrices if experts.is_transposed else ())
        for name in matrices:
            shape = getattr(experts, name).shape
            if experts.is_transposed:
                shape = torch.Size((shape[0], shape[2], shape[1]))
            dtype = torch.int8 if quantized else None
            weight = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            absmax = torch.empty(shape[:-1], dtype=torch.float32, device="meta")
            self.register_buffer(absmax_name(name), absmax if quantized else None)
        for name in (f"{name}_bias" for name in matrices):
            bias = getattr(experts, name, None)
            if bias is not None:
                bias = nn.Parameter(torch.empty(bias.shape, device="meta"), requires_grad=False)
            self.register_parameter(name, bias)

    def forward(self, hidden_TH: Tensor, chosen_TR: Tensor, weight_TR: Tensor) -> Tensor:
        num_tokens, per_token = chosen_TR.shape
        chosen = chosen_TR.flatten()
        order = chosen.argsort(stable=True)
        # bincount would synchronize with the device to read its largest value.
        counted = chosen.new_zeros(self.num_experts).index_add_(0, chosen, torch.ones_like(chosen))
        counts: list[int] = counted.tolist()
        sorted_tokens = hidden_TH[order // per_token].split(counts)
        outputs = [
            self._expert(tokens, e) for e, tokens in enumerate(sorted_tokens) if counts[e] > 0
        ]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        output_TRH = torch.cat(outputs)[back].view(num_tokens, per_token, -1)
        return (output_TRH * weight_TR[..., None]).sum(1).to(hidden_TH.dtype)

    def _expert(self, tokens: Tensor, e: int) -> Tensor:
        up = self._project(self._up, tokens, e)
        return self._project("down_proj", self._apply_gate(up), e)

    def _project(self, name: str, x: Tensor, e: int) -> Tensor:
        y = frozen_matmul(x, partial(self._matrix, name, e))
        bias = getattr(self, f"{name}_bias")
        return y if bias is None else y + bias[e].to(x.dtype)

    def _matrix(self, name: str, e: int) -> tuple[Tensor, Tensor | None]:
        absmax = getattr(self, absmax_name(name))
        return getattr(self, name)[e], None if absmax is None else absmax[e] / INT8_MAX
