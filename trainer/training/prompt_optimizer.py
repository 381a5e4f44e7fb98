"""One prompt's optimizer: update rule, schedule, clipping, weight decay and averaging.

The optimizer depends only on the prompt's own settings and gradients, so that a prompt trained in a
bank equals the same prompt trained alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Prompt
from trainer.config.prompt_defaults import DEFAULT_BETAS
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens, kind_of
from trainer.training.lr_schedules import learning_rate_factor
from trainer.training.optimizers import make_update_rule

#: Names of a parameter's average and initial value in a checkpoint, beside its moments.
AVERAGE, START = "average", "start"
#: Name of ``_unit`` in a checkpoint.
UNIT = "unit"


class PromptOptimizer:
    """An optimizer with warm-up, schedule, and clipping by the prompt's global norm.

    Weight decay is decoupled from the gradient (arXiv 1711.05101) for every update rule.

    Args:
        decay_to_start: weight decay pulls towards the values at construction instead of zero.
        scale: factor of the learning rate, for a rate relative to the initial values. Adam moves
            every element by about the learning rate, so a relative rate suits every base. A tensor,
            if parts of the parameter have different factors; it is broadcast to the parameter.
        ema_decay: share of the running average that an update keeps; None: no average.

    Attributes:
        averaged: exponential moving average of the parameters, which is validated and exported;
            None without one. The decay rises from ``(1 + t) / (10 + t)``, so that a short run
            forgets its initial values (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        num_updates: int,
        scale: float | Tensor = 1.0,
        optimizer: str = "adamw",
        momentum: float = 0.0,
        betas: tuple[float, float] | None = DEFAULT_BETAS,
        schedule: str = "linear",
        weight_decay: float = 0.0,
        decay_to_start: bool = False,
        num_warmup_updates: int = 0,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        kind: type[SoftPrompt] = VirtualTokens,
    ) -> None:
        self.updates = 0
        self._parameters = dict(parameters)
        self._schedule, self._num_updates = schedule, num_updates
        self._scale = float(torch.as_tensor(scale).mean())
        #: Factors of the parts' learning rates, whose mean is 1; None: they are equal.
        self._unit = scale / scale.mean() if isinstance(scale, Tensor) else None
        self._peak = learning_rate
        self._num_warmup, self._max_grad_norm = num_warmup_updates, max_grad_norm
        self._weight_decay, self._ema_decay = weight_decay, ema_decay
        self._optimizer = make_update_rule(
            optimizer, list(self._parameters.values()), learning_rate, momentum, betas, kind
        )
        self._start = self._copies() if decay_to_start and weight_decay else None
        self.averaged = None if ema_decay is None else self._copies()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return self._rate * self._scale

    @property
    def _rate(self) -> float:
        """Learning rate of the next update, before multiplication by ``scale``."""
        factor = learning_rate_factor(
            self._schedule, self.updates, self._num_warmup, self._num_updates
        )
        return self._peak * factor

    def step(self) -> float:
        """Clip the gradients, update the parameters, and clear the gradients.

        Returns:
            The norm before clipping. If it is not finite, weights, moments and schedule have not
            changed.
        """
        norm = self._clip()
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = self.learning_rate
            self._decay()
            self._move()
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
    def _move(self) -> None:
        """Make the update of the optimizer, with the learning rate of each part."""
        if self._unit is None:
            self._optimizer.step()
            return
        before = self._copies()
        self._optimizer.step()
        for name, parameter in self._parameters.items():
            parameter.copy_(before[name].lerp(parameter, self._unit))

    @torch.no_grad()
    def _decay(self) -> None:
        rate = self._rate * self._weight_decay  # relative to the weights, independent of the scale
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

        Tensors are CPU copies named ``PARAMETER/MOMENT``, ``/average`` and ``/start``.
        """
        state: dict[str, Any] = {"updates": self.updates, "scale": self._scale}
        if self._unit is not None:
            state[UNIT] = self._unit.detach().to("cpu", copy=True)
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
        unit = state.get(UNIT)  # absent in checkpoints of earlier versions, with one learning rate
        device = next(iter(self._parameters.values())).device
        self._unit = None if unit is None else unit.to(device, copy=True)


def make_optimizer(
    prompt: Prompt,
    parameters: Mapping[str, nn.Parameter],
    num_updates: int,
    scale: float | Tensor = 1.0,
) -> PromptOptimizer:
    """Create the optimizer of a prompt. Warm-up is rounded up, as in transformers.

    Args:
        scale: scale of the encoder's initial values, the unit of a relative learning rate.
    """
    relative = prompt.relative_learning_rate
    rate = prompt.learning_rate if relative is None else relative
    assert rate is not None, "config sets one of them"
    assert prompt.optimizer is not None, "config sets it"
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
        kind=kind_of(prompt.entry),
    )
