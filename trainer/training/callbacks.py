"""Events of the training loop, and the callbacks that receive them.

The loop calls its callbacks in order. ``trainer.tracking`` and ``trainer.checkpointing`` define
further callbacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from trainer.runtime.console import Console
from trainer.runtime.step_line import StepLine
from trainer.training.progress import TrainingProgress


@dataclass(frozen=True)
class Metrics:
    """Numbers of one prompt after a step; ``prompt=None``: of the whole run.

    Attributes:
        useful_tokens: tokens read up to this step by the prompt, or by all prompts.
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
        """Called before the first step of this process, after the baselines."""

    def on_step_end(self, report: StepReport) -> None:
        """Called after the update of all prompts."""

    def on_validation_end(self, metrics: Sequence[Metrics]) -> None:
        """Called after the validation of all prompts that were due."""

    def on_checkpoint(self) -> None:
        """Called to save the state of the run."""

    def on_run_end(self) -> None:
        """Called after the last step, also if an exception ends the run."""


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
        if report.step == self._last_step:  # before the lines of the last validation
            self._line.end()

    def on_run_end(self) -> None:
        self._open.close()
