"""Update rules: Adafactor, Muon and those of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens


class _Directed(torch.optim.Optimizer):
    """Subtracts learning rate times ``_direction`` from every parameter that has a gradient."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._direction(parameter, group)
                    parameter.add_(update, alpha=-group["lr"])
        return None

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Adafactor(_Directed):
    """Adafactor without parameter scaling, relative steps or first moment (arXiv 1804.04235).

    The second moment of a matrix is stored as the means of its rows and columns; the decay rate of
    update t is ``1 - t ** -0.8``; updates are clipped to a root mean square of 1. Equal to
    transformers' ``Adafactor(scale_parameter=False, relative_step=False)``, as used for prompts by
    Lester et al. (arXiv 2104.08691, section 3). torch's Adafactor always scales by the parameter.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        decay_rate: float = 0.8,
        eps: float = 1e-30,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "decay_rate": decay_rate, "eps": eps})

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        square = gradient.square().add_(group["eps"])
        factored = gradient.dim() > 1
        means = {"rows": square.mean(-1), "columns": square.mean(-2)} if factored else {}
        means = means or {"square": square}
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(mean) for name, mean in means.items()})
        state["step"] += 1
        for name, mean in means.items():
            state[name].lerp_(mean, float(state["step"]) ** -group["decay_rate"])
        if factored:
            rows = state["rows"] / state["rows"].mean(-1, keepdim=True)
            update = rows.rsqrt()[..., None] * state["columns"].rsqrt()[..., None, :] * gradient
        else:
            update = state["square"].rsqrt() * gradient
        return update / update.square().mean().sqrt().clamp(min=1.0)


#: Newton-Schulz iteration towards the nearest orthogonal matrix, with Jordan's coefficients.
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon(_Directed):
    """Orthogonalized momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    A few directions dominate the gradient of a prompt; Muon gives all directions equal weight. The
    root mean square of each matrix's update is the learning rate, as in arXiv 2502.16982 (section
    2.2), so that learning rates are comparable with Adam's. Virtual tokens are one matrix [P, H];
    keys and values [P, L, 2, A, D] are one matrix [P, A * D] for each layer's keys and for its
    values. Computed in float64, because weak directions and their rounding errors grow by up to 500
    times.

    Args:
        momentum: share of the mean gradient that an update keeps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        kind: type[SoftPrompt] = VirtualTokens,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self._kind = kind

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
        orthogonal = _newton_schulz(self._kind.to_matrices(state["mean"]).double())
        return self._kind.from_matrices(orthogonal, parameter.shape).to(parameter)


def _newton_schulz(matrices: Tensor) -> Tensor:
    """Approximate the nearest orthogonal matrices with a root mean square of 1; keep zeros."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    tiny = torch.finfo(wide.dtype).tiny
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    x = x / x.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=tiny)
    return x if wide is matrices else x.mT


def make_update_rule(
    name: str,
    parameters: list[nn.Parameter],
    learning_rate: float,
    momentum: float,
    betas: tuple[float, float] | None,
    kind: type[SoftPrompt],
) -> torch.optim.Optimizer:
    """Create an optimizer without weight decay, which ``PromptOptimizer`` applies.

    The same formula runs on every device: fused and foreach kernels round differently, and the
    replicas of all ranks must stay bit-equal.
    """
    if name == "adafactor":
        return Adafactor(parameters, lr=learning_rate)
    if name == "muon":
        return Muon(parameters, lr=learning_rate, momentum=momentum, kind=kind)
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=learning_rate, momentum=momentum, foreach=False, fused=False
        )
    assert name == "adamw", f"unknown optimizer: {name}"
    assert betas is not None, "config sets them for adamw"
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=0.0, foreach=False, fused=False
    )
