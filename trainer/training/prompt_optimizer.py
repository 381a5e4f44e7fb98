"""One prompt's optimizer, schedule, clipping, averaging and early stop.

Every prompt has its own: what it does depends on nothing but its own settings and gradients, so
that a prompt trained in a bank equals the same prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from trainer.config import Prompt
from trainer.config.prompt import DEFAULT_BETAS
from trainer.config.ranking import LAST, ScoreKey

#: What a checkpoint calls the average and the start of a parameter, beside its moments.
AVERAGE, START = "average", "start"


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
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
        return _orthogonal(state["mean"])


def _orthogonal(prompt: Tensor) -> Tensor:
    """Of its matrices the nearest orthogonal ones, about, with a root mean square of 1."""
    if prompt.dim() == 2:
        return _newton_schulz(prompt.double()).to(prompt)
    assert prompt.dim() == 5, prompt.shape
    by_layer = prompt.permute(1, 2, 0, 3, 4)  # [L, 2, P, A, D]
    made = _newton_schulz(by_layer.flatten(3).double())
    return made.view(by_layer.shape).permute(2, 0, 1, 3, 4).to(prompt)


def _newton_schulz(matrices: Tensor) -> Tensor:
    """``[..., rows, columns]``; what is zero stays zero."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    tiny = torch.finfo(wide.dtype).tiny
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    x = x / x.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=tiny)
    return x if wide is matrices else x.mT


class PromptOptimizer:
    """An optimizer with warm-up, schedule, and clipping by one prompt's global norm.

    Weight decay is decoupled from the gradient (arXiv 1711.05101) in all of them.

    Args:
        decay_to_start: weight decay pulls towards the values at construction instead of zero.
        scale: what the learning rate is a share of. Adam moves every element by about its rate,
            whatever the gradient's size: relative to what the prompt starts from, the same rate
            means the same for every base.
        ema_decay: how much of the running average stays at an update; None: no average is kept.

    Attributes:
        updates: updates made so far.
        averaged: the parameters as they are to be judged and used: their exponential moving
            average; None where none is kept. Its decay begins low, ``(1 + t) / (10 + t)``, so that
            a short run does not remember its start (as TensorFlow's ExponentialMovingAverage).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        num_updates: int,
        scale: float = 1.0,
        optimizer: str = "adamw",
        momentum: float = 0.0,
        betas: tuple[float, float] | None = DEFAULT_BETAS,
        schedule: str = "linear",
        weight_decay: float = 0.0,
        decay_to_start: bool = False,
        num_warmup_updates: int = 0,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self.updates = 0
        self._parameters = dict(parameters)
        self._schedule, self._num_updates = schedule, num_updates
        self._scale = scale
        self._peak = learning_rate
        self._num_warmup, self._max_grad_norm = num_warmup_updates, max_grad_norm
        self._weight_decay, self._ema_decay = weight_decay, ema_decay
        self._optimizer = _make(
            optimizer, list(self._parameters.values()), learning_rate, momentum, betas
        )
        self._start = self._copies() if decay_to_start and weight_decay else None
        self.averaged = None if ema_decay is None else self._copies()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return self._rate * self._scale

    @property
    def _rate(self) -> float:
        """The same before it is made absolute."""
        factor = scheduled(self._schedule, self.updates, self._num_warmup, self._num_updates)
        return self._peak * factor

    def step(self) -> float:
        """Clip and update from the parameters' ``grad``, then clear it.

        Returns:
            The norm before clipping. If it is not finite, nothing has changed: neither weights nor
            moments nor the schedule.
        """
        norm = self._clip()
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = self.learning_rate
            self._decay()
            self._optimizer.step()
            self.updates += 1
            self._average()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> float:
        limit = math.inf if self._max_grad_norm is None else self._max_grad_norm
        return float(
            nn.utils.clip_grad_norm_(list(self._parameters.values()), limit, foreach=False)
        )

    @torch.no_grad()
    def _decay(self) -> None:
        rate = self._rate * self._weight_decay  # a share of the weights, whatever their scale
        if not rate:
            return
        for name, parameter in self._parameters.items():
            if self._start is None:
                parameter.mul_(1 - rate)
            else:
                parameter.lerp_(self._start[name], rate)

    @torch.no_grad()
    def _average(self) -> None:
        if self._ema_decay is None or self.averaged is None:
            return
        decay = min(self._ema_decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._parameters.items():
            self.averaged[name].lerp_(parameter, 1 - decay)

    def _copies(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next update depends on, except the weights.

        Returns:
            ``updates``, ``scale``, and copies on the CPU of the tensors ``PARAMETER/MOMENT``,
            ``PARAMETER/average`` and ``PARAMETER/start``.
        """
        state: dict[str, Any] = {"updates": self.updates, "scale": self._scale}
        for name, parameter in self._parameters.items():
            kept: dict[str, Any] = dict(self._optimizer.state.get(parameter, {}))
            if self.averaged is not None:
                kept[AVERAGE] = self.averaged[name]
            if self._start is not None:
                kept[START] = self._start[name]
            for key, value in kept.items():
                if value is not None:  # SGD's momentum, before the first update
                    state[f"{name}/{key}"] = value.detach().to("cpu", copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()`` with the learning rate and schedule of this run."""
        moments: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(self._parameters.items()):
            prefix = f"{name}/"
            kept = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            for key, copies in ((AVERAGE, self.averaged), (START, self._start)):
                value = kept.pop(key, None)
                if copies is not None and value is not None:
                    copies[name] = value.to(parameter.device, copy=True)
            if kept:
                moments[i] = {key: value.clone() for key, value in kept.items()}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.updates, self._scale = int(state["updates"]), float(state["scale"])


def _make(
    name: str,
    parameters: list[nn.Parameter],
    learning_rate: float,
    momentum: float,
    betas: tuple[float, float] | None,
) -> torch.optim.Optimizer:
    """One formula on every device: the fused and foreach kernels round differently, and replicas on
    all ranks must stay equal to the bit. Weight decay is ours."""
    if name == "adafactor":
        return Adafactor(parameters, lr=learning_rate)
    if name == "muon":
        return Muon(parameters, lr=learning_rate, momentum=momentum)
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=learning_rate, momentum=momentum, foreach=False, fused=False
        )
    assert name == "adamw", f"config allows an optimizer that nobody wrote: {name}"
    assert betas is not None, "config fills them in"
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=0.0, foreach=False, fused=False
    )


def make_optimizer(
    prompt: Prompt, parameters: Mapping[str, nn.Parameter], num_updates: int, scale: float = 1.0
) -> PromptOptimizer:
    """The optimizer that the run file asks for. Warm-up is rounded up, as transformers does.

    Args:
        scale: of the encoder, for a rate that is relative to it.
    """
    relative = prompt.relative_learning_rate
    rate = prompt.learning_rate if relative is None else relative
    assert rate is not None, "config fills one of them in"
    assert prompt.optimizer is not None, "and this"
    return PromptOptimizer(
        parameters,
        learning_rate=rate,
        scale=1.0 if relative is None else scale,
        num_updates=num_updates,
        optimizer=prompt.optimizer,
        momentum=prompt.momentum or 0.0,
        betas=prompt.betas,
        schedule=prompt.schedule,
        weight_decay=prompt.weight_decay,
        decay_to_start=prompt.weight_decay_to_init,
        num_warmup_updates=math.ceil(prompt.warmup_ratio * num_updates),
        max_grad_norm=prompt.max_grad_norm,
        ema_decay=prompt.ema,
    )


class EarlyStopping:
    """Tracks a prompt's best validation and decides when to stop waiting for a better one.

    Args:
        patience: evaluations in a row without improvement until ``should_stop``; None: never stop,
            only track.

    Attributes:
        best: ``ranking.score_key`` of the best scores so far; None before the first finite ones.
        best_step: the step they were measured at.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience
        self.best: ScoreKey | None = None
        self.best_step: int | None = None
        self._waited = 0

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self._waited >= self.patience

    def update(self, step: int, key: ScoreKey) -> bool:
        """Record one evaluation; True if it is the best so far. ``LAST`` never is."""
        improved = key != LAST and (self.best is None or key < self.best)
        if improved:
            self.best, self.best_step, self._waited = key, step, 0
        else:
            self._waited += 1
        return improved

    def state_dict(self) -> dict[str, Any]:
        """Return the state without ``best``, which follows from the scores at ``best_step``.

        ``patience`` belongs to the run file and may change on resume.
        """
        return {"best_step": self.best_step, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``; the caller sets ``best``."""
        self.best_step, self._waited = state["best_step"], state["waited"]
