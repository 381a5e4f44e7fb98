"""Events of the training loop, and the callbacks that receive them.

The loop calls all callbacks in their order. Tracking and checkpointing, which are above this
package, have their own. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from trainer.runtime.console import Console, StepLine
from trainer.training.progress import TrainingProgress


@dataclass(frozen=True)
class Metrics:
    """Numbers of one prompt after a step; ``prompt=None``: of the whole run.

    Attributes:
        useful_tokens: read until then by the prompt, or by all prompts.
    """

    step: int
    useful_tokens: int
    values: Mapping[str, float]
    prompt: str | None = None


@dataclass(frozen=True)
class StepReport:
    """One training step.

    Attributes:
        loss: mean over the prompts that were trained; NaN if there is none.
        tokens_per_second: useful tokens of all ranks.
        seconds_left: estimated time until the end of the run.
    """

    step: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    metrics: Sequence[Metrics]


class Callback:
    """Receives the events of a run; every method does nothing by default."""

    def on_run_start(self, progress: TrainingProgress) -> None:
        """Before the first step of this process, after the baselines."""

    def on_step_end(self, report: StepReport) -> None:
        """After the update of all prompts."""

    def on_validation_end(self, metrics: Sequence[Metrics]) -> None:
        """After the validation of all prompts that were due."""

    def on_checkpoint(self) -> None:
        """When the state of the run is to be saved."""

    def on_run_end(self) -> None:
        """After the last step, also if an exception ends the run."""


class ConsoleProgress(Callback):
    """The progress line on rank 0: step, loss, useful tokens per second, time left."""

    def __init__(self, console: Console, last_step: int) -> None:
        self._console, self._last_step = console, last_step
        self._line: StepLine | None = None
        self._open = ExitStack()

    def on_run_start(self, progress: TrainingProgress) -> None:
        training = self._console.training(self._last_step, progress.step)
        self._line = self._open.enter_context(training)

    def on_step_end(self, report: StepReport) -> None:
        assert self._line is not None
        self._line.show(report.step, report.loss, report.tokens_per_second, report.seconds_left)

    def on_run_end(self) -> None:
        self._open.close()
