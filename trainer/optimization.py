"""One prompt's optimizer, schedule, clipping and early stop.

Every prompt has its own: what it does depends on nothing but its own settings and gradients, so
that a prompt trained in a bank equals the same prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Prompt


def cosine_with_warmup(update: int, num_warmup_updates: int, num_updates: int) -> float:
    """Factor of the learning rate: linear from 0 to 1, then half a cosine down to 0.

    Args:
        update: updates made before this one.

    Source: ``get_cosine_schedule_with_warmup`` of transformers, with its default half cycle.
    """
    if update < num_warmup_updates:
        return update / max(1, num_warmup_updates)
    progress = (update - num_warmup_updates) / max(1, num_updates - num_warmup_updates)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


class PromptOptimizer:
    """AdamW with warm-up, cosine decay and clipping by the global norm of one prompt's parameters.

    Attributes:
        updates: updates made so far.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        num_updates: int,
        weight_decay: float = 0.0,
        num_warmup_updates: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.updates = 0
        self._parameters = dict(parameters)
        self._peak, self._num_updates = learning_rate, num_updates
        self._num_warmup, self._max_grad_norm = num_warmup_updates, max_grad_norm
        # One formula on every device: the fused and foreach kernels round differently, and replicas
        # on all ranks must stay equal to the bit.
        self._adamw = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=learning_rate,
            weight_decay=weight_decay,
            foreach=False,
            fused=False,
        )

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        factor = cosine_with_warmup(self.updates, self._num_warmup, self._num_updates)
        return self._peak * factor

    def step(self) -> float:
        """Clip and update from the parameters' ``grad``, then clear it.

        Returns:
            The norm before clipping. If it is not finite, nothing has changed: neither weights nor
            moments nor the schedule.
        """
        norm = self._clip()
        if math.isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = self.learning_rate
            self._adamw.step()
            self.updates += 1
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> float:
        limit = math.inf if self._max_grad_norm is None else self._max_grad_norm
        return float(
            nn.utils.clip_grad_norm_(list(self._parameters.values()), limit, foreach=False)
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies on the CPU of all that the next update depends on, except the weights.

        Returns:
            Tensors named ``PARAMETER/MOMENT``, and JSON.
        """
        tensors = {}
        for name, parameter in self._parameters.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True)
        return tensors, {"updates": self.updates}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go on from ``state()``; learning rate and schedule stay those of this run."""
        state: dict[int, dict[str, Tensor]] = {}
        for i, name in enumerate(self._parameters):
            prefix = f"{name}/"
            moments = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if moments:
                state[i] = {key: value.clone() for key, value in moments.items()}
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": state, "param_groups": groups})
        self.updates = int(meta["updates"])


def make_optimizer(
    prompt: Prompt, parameters: Mapping[str, nn.Parameter], num_updates: int
) -> PromptOptimizer:
    """The optimizer that the run file asks for. Warm-up is rounded up, as transformers does."""
    return PromptOptimizer(
        parameters,
        learning_rate=prompt.learning_rate,
        num_updates=num_updates,
        weight_decay=prompt.weight_decay,
        num_warmup_updates=math.ceil(prompt.warmup_ratio * num_updates),
        max_grad_norm=prompt.max_grad_norm,
    )


class EarlyStopping:
    """Tracks the best validation loss and says when waiting for a better one is over.

    Args:
        patience: evaluations in a row without improvement until ``should_stop``; None: never stop,
            only track.

    Attributes:
        best: the lowest finite loss so far; None before the first.
        best_step: the step it was seen at.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience
        self.best: float | None = None
        self.best_step: int | None = None
        self._waited = 0

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self._waited >= self.patience

    def update(self, step: int, loss: float) -> bool:
        """Note one evaluation; True if it is the best so far. A non-finite loss never is."""
        improved = math.isfinite(loss) and (self.best is None or loss < self.best)
        if improved:
            self.best, self.best_step, self._waited = loss, step, 0
        else:
            self._waited += 1
        return improved

    def state(self) -> dict[str, Any]:
        """JSON; ``patience`` belongs to the run file and may change on resume."""
        return {"best": self.best, "best_step": self.best_step, "waited": self._waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self._waited = state["waited"]
