"""Update rules and learning-rate schedules that torch does not have, or not in this form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens


def cosine_decay(progress: float) -> float:
    """Half a cosine from 1 to 0; as in transformers' ``get_cosine_schedule_with_warmup``."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def linear_decay(progress: float) -> float:
    """From 1 to 0 in a line; as in transformers' ``get_linear_schedule_with_warmup``."""
    return max(0.0, 1.0 - progress)


#: Factor of the learning rate after warm-up, by the share of its updates that were made.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": linear_decay,
    "cosine": cosine_decay,
}


def scheduled(schedule: str, update: int, num_warmup_updates: int, num_updates: int) -> float:
    """Factor of the learning rate: rises in a line to 1, then what the schedule says.

    Warm-up begins above 0, unlike transformers', whose first update changes nothing.

    Args:
        update: updates made before this one.
    """
    if update < num_warmup_updates:
        return (update + 1) / (num_warmup_updates + 1)
    progress = (update - num_warmup_updates) / max(1, num_updates - num_warmup_updates)
    return SCHEDULES[schedule](progress)


class _Directed(torch.optim.Optimizer):
    """Moves every parameter that has a gradient by its rate along what ``_direction`` gives."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        assert closure is None, "the loss is known already"
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

    The second moment of a matrix is kept as the means of its rows and columns; the decay rate of
    update t is ``1 - t ** -0.8``; an update whose root mean square is above 1 is scaled down to it.
    As Lester et al. use it for prompts (arXiv 2104.08691, section 3), and as transformers'
    ``Adafactor(scale_parameter=False, relative_step=False)``. torch's own always scales by the
    parameter.
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
    """Momentum whose matrices are made orthogonal: all directions of an update are equally large.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). An update's root mean square is
    the learning rate, for each matrix, as arXiv 2502.16982 (section 2.2) holds it to that of Adam,
    so that rates mean the same for both. Virtual tokens are one matrix [P, H]; keys and values [P,
    L, 2, A, D] are one matrix [P, A * D] for each layer's keys and for its values. The gradient of
    a prompt has a few directions that hide all others: Adam follows each element, Muon each
    direction. In float64: weak directions grow by up to 500 times, and rounding with them.

    Args:
        momentum: how much of the mean gradient stays at an update.
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
    """Approximate the nearest orthogonal matrices, each with a root mean square of 1.

    Args:
        matrices: [..., rows, columns]; a matrix of zeros stays zero.
    """
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
    """One formula on every device: the fused and foreach kernels round differently, and replicas on
    all ranks must stay equal to the bit. Weight decay is ours."""
    if name == "adafactor":
        return Adafactor(parameters, lr=learning_rate)
    if name == "muon":
        return Muon(parameters, lr=learning_rate, momentum=momentum, kind=kind)
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=learning_rate, momentum=momentum, foreach=False, fused=False
        )
    assert name == "adamw", f"config allows an optimizer that nobody wrote: {name}"
    assert betas is not None, "config fills them in"
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=0.0, foreach=False, fused=False
    )
