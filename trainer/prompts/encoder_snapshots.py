"""Text encoders as they were at their best validation: what reads new texts after the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer.config.ranking import LAST, ScoreKey

#: Gives the weights of a reader as they are judged, by their own names.
Judged = Callable[[], Mapping[str, Tensor]]


class BestEncoder:
    """Keeps one copy of a reader: that of the best validation, by the means over its prompts.

    The mean of its prompts' metrics decides, then the mean of their losses. A prompt that has
    stopped counts with its last scores, so that means stay comparable. Without any validation the
    newest reader is kept.

    Args:
        judged: called only when the reader is better than before.
    """

    def __init__(self, judged: Judged) -> None:
        self._judged = judged
        self._step, self._best = 0, LAST
        self._keys: dict[str, ScoreKey] = {}
        self._weights: dict[str, Tensor] = {}

    def update(self, step: int, keys: Mapping[str, ScoreKey | None]) -> None:
        """Keep the reader as it is now, if it is better.

        Args:
            keys: ``ranking.score_key`` of its prompts that were validated after ``step``; None:
                the prompt's task has no validation.
        """
        found = {name: key for name, key in keys.items() if key is not None}
        if LAST in found.values():
            return
        self._keys |= found
        mean = _mean(list(self._keys.values())) if self._keys else LAST
        if mean < self._best or not self._keys:
            self._step, self._best = step, mean
            weights = self._judged()
            self._weights = {
                name: value.detach().to("cpu", copy=True) for name, value in weights.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """Return the weights by name, which never change, and the scores that ranked them."""
        return {
            "step": self._step,
            "best": list(self._best),
            "keys": {name: list(key) for name, key in self._keys.items()},
            **self._weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, or from that of an older version, which ranked by loss.

        There a loss stands for the metric too: never better than a metric of which higher is
        better, so the next validation replaces it.
        """
        self._weights = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
        self._step = int(state["step"])
        if "losses" in state:
            self._best = (float(state["loss"]), float(state["loss"]))
            self._keys = {name: (loss, loss) for name, loss in state["losses"].items()}
        else:
            self._best = _pair(state["best"])
            self._keys = {name: _pair(key) for name, key in state["keys"].items()}


def _pair(values: Sequence[float]) -> ScoreKey:
    value, loss = values
    return float(value), float(loss)


def _mean(keys: Sequence[ScoreKey]) -> ScoreKey:
    values, losses = zip(*keys, strict=True)
    return sum(values) / len(keys), sum(losses) / len(keys)
