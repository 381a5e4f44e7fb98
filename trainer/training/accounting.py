"""Measures the time, useful tokens and gathered bytes of each step; estimates the time left."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from trainer.config import RunConfig
from trainer.data.task_data import TaskData
from trainer.distributed.deepspeed_engine import Engine
from trainer.runtime.phases import PhaseTimes
from trainer.training.callbacks import Metrics, StepReport
from trainer.training.progress import TrainingProgress
from trainer.training.step import StepResult


class Accounting:
    """Time and traffic of the steps of a run.

    Args:
        validated: steps after which prompts are validated, ascending.

    Attributes:
        steps: number of steps of this process; ``TrainingProgress`` counts those of the run.
        gathered_bytes, exchanged_bytes: totals of these steps; as in ``Engine``.
        cpu_seconds: of this process and its threads in these steps without the first, which
            compiles.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        tasks: Mapping[str, TaskData],
        progress: TrainingProgress,
        times: PhaseTimes,
        validated: Sequence[int],
    ) -> None:
        self._config, self._engine, self._tasks = config, engine, tasks
        self._progress, self._times, self._validated = progress, times, validated
        self.steps = self.gathered_bytes = self.exchanged_bytes = 0
        self.cpu_seconds = 0.0
        self._waited = 0.0
        self._earlier = (0.0, 0.0)  # seconds and rank-seconds of earlier processes

    def resume(self) -> None:
        """Continue from the seconds of earlier processes in ``TrainingProgress``."""
        seconds = sum(self._progress.phase_seconds.values())
        self._times.add(self._progress.phase_seconds)
        ranks = self._progress.rank_seconds or seconds * self._engine.world_size
        self._earlier = seconds, ranks

    @property
    def rank_seconds(self) -> float:
        """Seconds of the run so far, each times the number of its ranks."""
        seconds, ranks = self._earlier
        return ranks + (sum(self._times.seconds.values()) - seconds) * self._engine.world_size

    def start_step(self) -> None:
        """Begin to measure a step."""
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._gathered = self._engine.gathered_bytes
        self._exchanged = self._engine.exchanged_bytes

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the seconds of the ``with`` block as waiting for the next batch."""
        started = time.perf_counter()
        yield
        self._waited = time.perf_counter() - started
        self._progress.data_wait_seconds += self._waited

    def end_step(
        self, result: StepResult, norms: Sequence[float], learning_rates: Sequence[float]
    ) -> StepReport:
        """Finish measuring a step, after ``TrainingProgress.end_step``.

        Args:
            norms, learning_rates: of each prompt's update, [K].
        """
        seconds = time.perf_counter() - self._started
        if self.steps:
            self.cpu_seconds += time.process_time() - self._cpu_started
        gathered = self._engine.gathered_bytes - self._gathered
        self._progress.train_seconds += seconds
        self.steps += 1
        self.gathered_bytes += gathered
        self.exchanged_bytes += self._engine.exchanged_bytes - self._exchanged
        metrics = self._prompt_metrics(result, norms, learning_rates)
        speed = {
            "useful_tokens_per_second": result.useful_tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": self._waited,
            "gathered_bytes": gathered,
        }
        step = self._progress.step
        metrics.append(Metrics(step, self._progress.useful_tokens, speed))
        losses = [loss for loss in result.losses if not math.isnan(loss)]
        mean = sum(losses) / len(losses) if losses else math.nan
        return StepReport(step, mean, result.useful_tokens / seconds, self.seconds_left(), metrics)

    def _prompt_metrics(
        self, result: StepResult, norms: Sequence[float], learning_rates: Sequence[float]
    ) -> list[Metrics]:
        progress, metrics = self._progress, []
        for k, prompt in enumerate(self._config.prompts):
            name = prompt.name
            progress.add_train_loss(name, result.losses[k])
            if not math.isnan(result.losses[k]) or result.skipped[k]:
                values = {
                    "train_loss": result.losses[k],
                    "grad_norm": norms[k],
                    "learning_rate": learning_rates[k],
                    "skipped_updates": progress.skipped.get(name, 0),
                }
                tokens = progress.prompt_tokens.get(name, 0)
                metrics.append(Metrics(progress.step, tokens, values, name))
        return metrics

    def seconds_left(self) -> float:
        """Estimate the remaining time from the measured steps and validations."""
        progress = self._progress
        steps = self._config.last_step - progress.step
        validations = len(self._validated) - bisect_right(self._validated, progress.step)
        training = steps * progress.train_seconds / progress.step
        return training + validations * self._validation_seconds()

    def _validation_seconds(self) -> float:
        """Estimate the time of one validation of all prompts.

        Before the first validation, the time follows from the baselines, which read the same rows.
        As baselines may come from the cache, the estimate is at least half of the time of training
        on as many tokens.
        """
        progress, seconds, prompts = self._progress, self._times.seconds, self._config.prompts
        if progress.validations:
            return seconds.get("validation", 0.0) / progress.validations
        arms = sum(1 + len(data.task.hand_written) for data in self._tasks.values())
        from_baselines = seconds.get("baselines", 0.0) * len(prompts) / arms
        if not progress.useful_tokens:
            return from_baselines
        tokens = sum(
            rows.num_tokens
            for prompt in prompts
            for rows in self._tasks[prompt.task].evaluation.values()
        )
        per_token = progress.train_seconds / progress.useful_tokens
        return max(from_baselines, tokens * per_token / 2)
