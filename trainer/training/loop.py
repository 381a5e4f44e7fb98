"""The training loop: the order of the events of a run.

score the baselines
until every prompt has stopped:
    next batch; forward and backward; all-reduce of the gradients
    one optimizer step per prompt; stop diverged prompts
    on a stop signal: checkpoint, and stop on all ranks together
    validate the prompts that are due; stop early, at a rung, or at the last step
    checkpoint if due
complete the predictions; score some train rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import RunConfig
from trainer.data.task_data import TaskData
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.prefetch import StepBatch, StepPrefetcher
from trainer.evaluation.baselines import add_majority
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.prediction_records import Predictions
from trainer.packing.packed_row import PromptLengths
from trainer.prompts.bank import Bank
from trainer.prompts.soft_prompt import prompt_lengths
from trainer.runtime.console import Console
from trainer.runtime.phases import PhaseTimes
from trainer.runtime.stop_signals import Stopped
from trainer.training.accounting import Accounting
from trainer.training.baseline_scoring import (
    complete_predictions,
    score_missing_baselines,
    score_train_rows,
)
from trainer.training.callbacks import Callback, StepReport
from trainer.training.memory_monitor import MemoryMonitor
from trainer.training.progress import TrainingProgress
from trainer.training.skipped_updates import count_skipped, raise_if_all_diverged
from trainer.training.step import batch_gradients
from trainer.training.validation import Validator


@dataclass
class Loop:
    """A run that is ready to train.

    Attributes:
        callbacks: receive the events of the run, on every rank.
        predictions: keeps the predictions of the best steps; None on ranks other than 0.
    """

    config: RunConfig
    engine: Engine
    evaluator: Evaluator
    tasks: Mapping[str, TaskData]
    bank: Bank
    batches: StepPrefetcher
    console: Console
    callbacks: list[Callback] = field(default_factory=list)
    predictions: Predictions | None = None
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    times: PhaseTimes = field(default_factory=PhaseTimes)

    def __post_init__(self) -> None:
        self.validator = Validator(
            self.config,
            self.engine,
            self.evaluator,
            self.tasks,
            self.bank,
            self.progress,
            self.console,
            self.predictions,
        )
        self.accounting = Accounting(
            self.config, self.engine, self.tasks, self.progress, self.times, self.validator.steps
        )
        self.memory = MemoryMonitor(self.engine, self.evaluator.budget, self.console)
        self._stopping = False

    def run(self) -> None:
        """Train until every prompt has stopped.

        Raises:
            Diverged: if all prompts stopped because they diverged.
            Stopped: after a rank received a stop signal and the state of the last step was saved.
        """
        try:
            self._score_baselines()
            self._train()
            with self.times("validation"):
                complete_predictions(self.validator)
                score_train_rows(self.validator)
        finally:
            self.batches.close()

    def _score_baselines(self) -> None:
        with self.times("baselines"):
            score_missing_baselines(self.validator)
            with self.console.phase("counting the labels of train rows"):
                add_majority(self.tasks, self.progress.baselines, self.validator.predictions)

    def _train(self) -> None:
        limit = self.config.training.max_skipped_updates
        try:
            for callback in self.callbacks:
                callback.on_run_start(self.progress)
            while self.progress.unjudged or self._has_steps_left():
                if not self.progress.unjudged:  # otherwise a resumed run repeats the validation
                    self._step()
                    raise_if_all_diverged(self.progress, len(self.bank), limit)
                    self._stop_if_signalled()
                self._validate()
                self._checkpoint_if_due()
        finally:
            for callback in self.callbacks:
                callback.on_run_end()

    def _has_steps_left(self) -> bool:
        return self.progress.step < self.config.last_step and any(self.bank.active)

    def _step(self) -> None:
        with self.times("training"), self.engine.training_step(self.progress.step + 1):
            report = self._update_prompts()
        for callback in self.callbacks:
            callback.on_step_end(report)

    def _update_prompts(self) -> StepReport:
        self.accounting.start_step()
        self.memory.start_step()
        virtual_tokens = self.bank.virtual_tokens()
        batch = self._next_batch(prompt_lengths(virtual_tokens))
        result = batch_gradients(
            self.engine,
            self.evaluator.base,
            batch,
            virtual_tokens,
            self.memory.saved,
            self.evaluator.teachers,
        )
        self.memory.end_step(self.progress.step + 1, result)
        rates = self.bank.learning_rates
        norms = self.bank.update(result.gradients)
        self._stopping = result.stopping
        self.progress.end_step(self.bank.names, result.tokens)
        self._stop_diverged(result.skipped, norms)
        return self.accounting.end_step(result, norms, rates)

    def _next_batch(self, lengths: PromptLengths) -> StepBatch:
        with self.accounting.waiting_for_data():
            budget = self.evaluator.budget.now
            return self.batches.next_step(self.bank.active, lengths, budget)

    def _stop_diverged(self, skipped: Sequence[bool], norms: Sequence[float]) -> None:
        limit, names = self.config.training.max_skipped_updates, self.bank.names
        for k in count_skipped(self.progress, names, skipped, norms, limit, self.console.warn):
            self.bank.stop(k)
            self.progress.mark_stopped(names[k], "diverged")

    def _stop_if_signalled(self) -> None:
        if self._stopping:
            self._checkpoint()
            raise Stopped

    def _validate(self) -> None:
        """Validate the prompts that are due; on a stop signal, save a checkpoint first."""
        try:
            with self.times("validation"):
                if due := self.validator.due():
                    metrics = self.validator.validate(due)
                    for callback in self.callbacks:
                        callback.on_validation_end(metrics)
                    self.validator.stop_finished(due)
        except Stopped:
            self._checkpoint()
            raise
        self.progress.unjudged = False

    def _checkpoint_if_due(self) -> None:
        ended = not any(self.bank.active)
        if ended or self.progress.step % self.config.checkpoint.every == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        with self.times("saving"):
            for callback in self.callbacks:
                callback.on_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs except the state of the bank."""
        self.progress.phase_seconds = self.times.seconds
        self.progress.rank_seconds = self.accounting.rank_seconds
        stopping = self.validator.stopping
        return {
            "progress": vars(self.progress),
            "stopping": {name: rule.state_dict() for name, rule in stopping.items()},
            "feed": self.batches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        vars(self.progress).update(vars(TrainingProgress(**state["progress"])))
        self.accounting.resume()
        for k, name in enumerate(self.bank.names):
            rule = self.validator.stopping[name]
            rule.load_state_dict(state["stopping"][name])
            if (best := self.progress.scores.get(name)) is not None:
                rule.best = self.validator.key(k, best)
        # The prompts may have another order in the run file now.
        feed = dict(zip(state["stopping"], state["feed"], strict=True))
        self.batches.load_state_dict([feed[name] for name in self.bank.names])
