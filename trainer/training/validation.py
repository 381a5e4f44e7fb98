"""Validation: scores the prompts that are due, keeps the best, and stops prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.config.ranking import ScoreKey, score_key
from trainer.data.task_data import EvalSet, TaskData
from trainer.distributed.deepspeed_engine import Engine
from trainer.evaluation.baselines import VALIDATION, merge_scores
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.prediction_records import Predictions, scored_columns
from trainer.evaluation.scoring import Request, Scored
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.prompts.bank import Bank
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime.console import Console
from trainer.training.callbacks import Metrics
from trainer.training.early_stopping import EarlyStopping
from trainer.training.halving import eliminated, rungs
from trainer.training.progress import Scores, TrainingProgress
from trainer.training.validation_report import ValidationReport


@dataclass
class Validator:
    """Validates the prompts of a run.

    Attributes:
        predictions: keeps the predictions of the best steps; None on ranks other than 0.
        steps: steps after which prompts are validated, ascending.
    """

    config: RunConfig
    engine: Engine
    evaluator: Evaluator
    tasks: Mapping[str, TaskData]
    bank: Bank
    progress: TrainingProgress
    console: Console
    predictions: Predictions | None = None

    def __post_init__(self) -> None:
        rule = self.config.evaluation.early_stopping
        patience = rule.patience if rule else None
        self.stopping = {name: EarlyStopping(patience) for name in self.bank.names}
        self._last_steps = [self.config.prompt_steps(prompt) for prompt in self.config.prompts]
        self._steps = [self.config.evaluation.validated(last) for last in self._last_steps]
        self.steps = validation_steps(self.config)
        self._latest: dict[int, Scores] = {}
        self._rungs = rungs(self.config.search.halving, self.config.last_step)
        self._report = ValidationReport(self.config, self.tasks, self.console)

    def due(self) -> list[int]:
        """Prompts to validate now: all at intervals and rungs, each at its own last step."""
        step = self.progress.step
        active = [k for k, active in enumerate(self.bank.active) if active]
        return [k for k in active if step in self._steps[k] or step in self._rungs]

    def validate(self, due: Sequence[int]) -> list[Metrics]:
        """Score prompts on all splits of their tasks, keep the best, and stop early; a collective.

        Raises:
            Stopped: if a rank received a stop signal; nothing has changed.
        """
        self._check_replicas()
        step = self.progress.step
        requests = [self.request(k, split) for k in due for split in self._data(k).evaluation]
        results = self.score(f"validation at step {step}", requests, self.bank.judged())
        self.progress.validations += 1
        self._latest = {}
        validation: dict[int, Scored | None] = {}
        for k in due:
            own = [
                (r.rows.split, s) for r, s in zip(requests, results, strict=True) if r.prompt == k
            ]
            self._latest[k] = merge_scores((split, scored.scores) for split, scored in own)
            validation[k] = next((scored for split, scored in own if split == VALIDATION), None)
        keys = {k: self.key(k, scores) if scores else None for k, scores in self._latest.items()}
        self.bank.keep_best_encoders(step, keys)
        judged = [self._judge(k, self._latest[k], validation[k]) for k in due]
        self._show(due)
        return [metrics for metrics in judged if metrics is not None]

    def stop_finished(self, due: Sequence[int]) -> None:
        """Apply successive halving at a rung, and stop the prompts whose steps are done."""
        if self.progress.step in self._rungs:
            self.halve(self._latest)
        for k in due:
            if self.bank.active[k] and self.progress.step == self._last_steps[k]:
                self._stop(k, "finished")

    def halve(self, scores: Mapping[int, Scores]) -> None:
        """Stop the worst of the prompts of each task that still train, ranked by these scores."""
        step = self.progress.step
        keys = {
            k: self.key(k, scores[k])
            for k in scores
            if self.bank.active[k] and self._last_steps[k] > step
        }
        for task, kept, stopped in eliminated(self.config, keys):
            for k in stopped:
                self._stop(k, "halving")
            self._report.show_halving(step, task, kept, {k: scores[k] for k in stopped})

    def request(self, k: int, split: str) -> Request:
        """Return the request to score prompt ``k`` on a split of its task."""
        data = self._data(k)
        rows = data.evaluation_at(self.config.prompts[k].placement)[split]
        return Request(rows, k, data.teachers.get(self.bank.names[k]))

    def score(
        self, what: str, requests: Sequence[Request], prompts: Sequence[SoftPrompt]
    ) -> list[Scored]:
        """Score requests with these prompts, with a progress display; a collective."""
        if not requests:
            return []
        with self.console.phase(what, self.evaluator.num_texts(requests), "texts") as phase:
            return self.evaluator.score(requests, prompts, phase.advance)

    def keep_predictions(self, name: str, step: int, rows: EvalSet, scored: Scored) -> None:
        """Write the predictions of a prompt or baseline, on rank 0."""
        if self.predictions is not None:
            self.predictions.keep(name, step, rows, scored_columns(rows, scored))

    def key(self, k: int, scores: Mapping[str, float]) -> ScoreKey:
        """Return the sort key of prompt ``k`` with these scores; smaller is better."""
        return score_key(scores, self._data(k).task.metric)

    def _judge(self, k: int, scores: Scores, validation: Scored | None) -> Metrics | None:
        name, step = self.bank.names[k], self.progress.step
        if not scores:  # a task without validation keeps the newest prompt
            self.bank.keep_best(k)
            return None
        scores = scores | gaps(scores, *self.progress.train_losses.pop(name, (0.0, 0)))
        if self.stopping[name].update(step, self.key(k, scores)):
            self.bank.keep_best(k)
            self.progress.scores[name] = scores
            assert validation is not None, "a prompt is ranked by its validation rows"
            rows = self._data(k).evaluation_at(self.config.prompts[k].placement)[VALIDATION]
            self.keep_predictions(name, step, rows, validation)
        if self.stopping[name].should_stop:
            self._stop(k, "early_stopping")
        shown = {key: x for key, x in scores.items() if not key.endswith(STANDARD_ERROR)}
        return Metrics(step, self.progress.prompt_tokens.get(name, 0), shown, name)

    def _check_replicas(self) -> None:
        if len(set(self.engine.all_gather(self.bank.digest()))) > 1:
            raise RuntimeError(
                "the prompts of this run differ between ranks; all devices must be of one kind"
            )

    def _stop(self, k: int, reason: str) -> None:
        self.bank.stop(k)
        self.progress.mark_stopped(self.bank.names[k], reason)

    def _data(self, k: int) -> TaskData:
        return self.tasks[self.config.prompts[k].task]

    def _show(self, due: Sequence[int]) -> None:
        step = self.progress.step
        training = [
            k for k, last in enumerate(self._last_steps) if self.bank.active[k] and last > step
        ]
        stopped = {
            k: self.stopping[self.bank.names[k]].best_step or step
            for k in due
            if not self.bank.active[k]
        }
        self._report.show(step, self._latest, training, stopped)


def validation_steps(config: RunConfig) -> list[int]:
    """Return the steps after which prompts are validated, ascending: at intervals and rungs."""
    steps = set(rungs(config.search.halving, config.last_step))
    for prompt in config.prompts:
        steps |= config.evaluation.validated(config.prompt_steps(prompt))
    return sorted(steps)


def gaps(scores: Scores, train_sum: float, train_steps: int) -> Scores:
    """Return signs of overfitting: validation minus train loss, shifted minus validation loss.

    Args:
        train_sum, train_steps: sum and number of the train losses since the last validation.
    """
    differences = {}
    if train_steps:
        differences["generalization_gap"] = scores["validation_loss"] - train_sum / train_steps
    if "shifted_validation_loss" in scores:
        shifted = scores["shifted_validation_loss"]
        differences["shift_gap"] = shifted - scores["validation_loss"]
    return differences
