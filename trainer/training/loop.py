"""The order of events of a run. Knows no library: each line of the loop is one event.

read the rows of every active prompt
forward, backward, one all-reduce; leave out what is not finite
one optimizer step per prompt
log; stop what diverged; on a stop signal: save, end on all ranks together
validate what is due, keep the best, stop early or at a rung; checkpoint
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import RunConfig
from trainer.config.ranking import ScoreKey, score_key
from trainer.data.task_data import EvalSet, TaskData
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.prefetch import StepBatch, StepPrefetcher
from trainer.evaluation.baselines import (
    VALIDATION,
    add_majority,
    baselines_of,
    merge_scores,
    score_baselines,
)
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.prediction_records import Predictions, scored_columns
from trainer.evaluation.score_format import describe, format_score, shown_scores
from trainer.evaluation.scoring import Request, Scored
from trainer.evaluation.statistics import STANDARD_ERROR
from trainer.packing.packed_batch import PromptLengths
from trainer.prompts.bank import Bank
from trainer.prompts.soft_prompt import SoftPrompt, prompt_lengths
from trainer.runtime.console import Console, StepLine
from trainer.runtime.phase_times import PhaseTimes
from trainer.runtime.stop_signals import Stopped
from trainer.training.early_stopping import EarlyStopping
from trainer.training.halving import rungs, worst
from trainer.training.saved_tensors import SavedBytes
from trainer.training.step import StepResult, batch_gradients

Scores = dict[str, float]


class Diverged(RuntimeError):
    """Every prompt's updates were not finite too many times in a row."""


@dataclass
class TrainingProgress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        data_wait_seconds: part of ``train_seconds`` in which nothing was there to compute with.
        prompt_tokens: of ``useful_tokens`` those that each prompt has read.
        scores: of each prompt at its best validation, by metric name.
        skipped: updates left out so far, and in a row, of each prompt.
        stopped: of each prompt that has: the ``step``, and the ``reason``: ``finished`` (its steps
            are done), ``early_stopping``, ``halving`` or ``diverged``.
        train_losses: of each prompt since its last validation: their sum, and how many.
        unjudged: the last step is done, but not yet what may follow it: validation, early stops.
        validations: how many times prompts were validated.
        phase_seconds: of ``PhaseTimes``, of all processes of the run.
    """

    step: int = 0
    useful_tokens: int = 0
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    train_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    baselines: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    stopped: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    unjudged: bool = False
    validations: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)


def _nothing(*_: object) -> None:
    """What ranks other than 0 do where it writes."""


@dataclass
class Loop:
    """A run that is ready to go.

    Attributes:
        saved_bytes_per_token: of the first packed batch, between its forward and its backward.
        log, save, between_steps: what is done with the numbers of a step, with the state of the run
            where a checkpoint is due, and after every step.
        predictions: where predictions are kept; None on other ranks than 0.
        steps_here, train_gathered_bytes, train_exchanged_bytes: since this process started, unlike
            ``progress``; the latter are part of the former.
    """

    config: RunConfig
    engine: Engine
    evaluator: Evaluator
    tasks: Mapping[str, TaskData]
    bank: Bank
    feed: StepPrefetcher
    console: Console
    log: Callable[[int, int, Mapping[str, float], str | None], None] = _nothing
    save: Callable[[Loop], None] = _nothing
    between_steps: Callable[[], object] = _nothing
    predictions: Predictions | None = None
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    times: PhaseTimes = field(default_factory=PhaseTimes)

    def __post_init__(self) -> None:
        rule = self.config.evaluation.early_stopping
        patience = rule.patience if rule else None
        self.steps_here = 0
        self.train_gathered_bytes = self.train_exchanged_bytes = 0
        self.saved_bytes_per_token = 0.0
        self._stopping = False
        self.stopping = {name: EarlyStopping(patience) for name in self.bank.names}
        self.last_step = self.config.last_step
        self._steps = [self.config.prompt_steps(prompt) for prompt in self.config.prompts]
        self._rungs = rungs(self.config.search.halving, self.last_step)
        every = range(0, self.last_step + 1, self.config.evaluation.every)
        self._validated = sorted({*every, *self._rungs, *self._steps})

    def run(self) -> None:
        """Train until every prompt has stopped.

        Raises:
            Diverged: if that is because all of them have diverged.
            Stopped: a rank received a stop signal; the state of the last step is saved.
        """
        try:
            with self.times("baselines"):
                if not self.progress.baselines:
                    self._score_baselines()
                with self.console.phase("counting the labels of train rows"):
                    add_majority(self.tasks, self.progress.baselines, self.predictions)
            with self.console.training(self.last_step, self.progress.step) as line:
                while self.progress.unjudged or self._goes_on():
                    if not self.progress.unjudged:
                        with (
                            self.times("training"),
                            self.engine.training_step(self.progress.step + 1),
                        ):
                            self._step(line)
                        self.between_steps()
                        self._raise_if_all_diverged()
                        self._stop_if_told()
                    with self.times("validation"):
                        self._judge_step()
                    ended = not any(self.bank.active)
                    if ended or self.progress.step % self.config.checkpoint.every == 0:
                        self._save()
            with self.times("validation"):
                self._complete_predictions()
        finally:
            self.feed.close()

    def _goes_on(self) -> bool:
        return self.progress.step < self.last_step and any(self.bank.active)

    def _stop_if_told(self) -> None:
        """Save this step and stop, on all ranks together, if one of them received a stop signal."""
        if self._stopping:
            self._save()
            raise Stopped

    def _save(self) -> None:
        with self.times("saving"):
            self.save(self)

    def _judge_step(self) -> None:
        """Validate what is due; if a stop signal interrupts it, a resumed run repeats it."""
        try:
            self._evaluate()
        except Stopped:
            self._save()
            raise
        self.progress.unjudged = False

    def _step(self, line: StepLine) -> None:
        started, gathered = time.perf_counter(), self.engine.gathered_bytes
        exchanged = self.engine.exchanged_bytes
        virtual_tokens = self.bank.virtual_tokens()
        step_batch, waited = self._next_batch(prompt_lengths(virtual_tokens))
        saved = SavedBytes() if self.steps_here == 0 else None
        self.engine.reset_peak_memory()
        result = batch_gradients(
            self.engine,
            self.evaluator.base,
            step_batch,
            virtual_tokens,
            saved,
            self.evaluator.teachers,
        )
        self._confirm_budget(result, saved)
        rates = self.bank.learning_rates
        norms = self.bank.update(result.gradients)
        self.progress.step += 1
        self.progress.unjudged, self._stopping = True, result.stopping
        self.progress.useful_tokens += result.useful_tokens
        read = self.progress.prompt_tokens
        for name, tokens in zip(self.bank.names, result.tokens, strict=True):
            read[name] = read.get(name, 0) + tokens
        self._count_skipped(result, norms)

        seconds = time.perf_counter() - started
        gathered = self.engine.gathered_bytes - gathered
        self.progress.train_seconds += seconds
        self.steps_here += 1
        self.train_gathered_bytes += gathered
        self.train_exchanged_bytes += self.engine.exchanged_bytes - exchanged
        self._log_step(result, norms, rates, seconds, gathered, waited)
        losses = [loss for loss in result.losses if not math.isnan(loss)]
        line.show(
            self.progress.step,
            sum(losses) / len(losses) if losses else math.nan,
            result.useful_tokens / seconds,
            self._seconds_left(),
        )

    def _seconds_left(self) -> float:
        """Estimate for the remaining steps and validations, from those that were measured.

        Before the first validation: from the baselines, which read the same rows but may have been
        scored by an earlier run; at least half of the time of training on as many tokens.
        """
        step, seconds = self.progress.step, self.times.seconds
        steps = self.last_step - step
        left = steps * self.progress.train_seconds / step
        validations = len(self._validated) - bisect_right(self._validated, step)
        if self.progress.validations:
            left += validations * seconds.get("validation", 0.0) / self.progress.validations
        else:
            arms = sum(1 + len(data.task.hand_written) for data in self.tasks.values())
            from_baselines = seconds.get("baselines", 0.0) * len(self.bank) / arms
            tokens = sum(
                rows.num_tokens
                for prompt in self.config.prompts
                for rows in self.tasks[prompt.task].evaluation.values()
            )
            trained = self.progress.useful_tokens
            from_training = self.progress.train_seconds * tokens / trained / 2 if trained else 0.0
            left += validations * max(from_baselines, from_training)
        return left

    def _next_batch(self, prompt_lengths: PromptLengths) -> tuple[StepBatch, float]:
        """What this step reads, and the seconds that were waited for it."""
        started = time.perf_counter()
        step_batch = self.feed.next_step(
            self.bank.active, prompt_lengths, self.evaluator.budget.now
        )
        waited = time.perf_counter() - started
        self.progress.data_wait_seconds += waited
        return step_batch, waited

    def _confirm_budget(self, result: StepResult, saved: SavedBytes | None) -> None:
        """Shorten packed batches, equally on all ranks, if they used more memory than estimated."""
        budget = self.evaluator.budget
        if saved is not None:
            self.saved_bytes_per_token = saved.total / max(1, result.first_batch)
        if result.splits:
            budget.halve()
            self.console.warn(
                f"step {self.progress.step + 1}: {result.splits} packed batch(es) did not fit and "
                f"were split; packed batches have up to {budget.tokens:,} tokens from now on"
            )
        elif budget.ramp:
            peak = max(self.engine.peak_activation_bytes(), saved.total if saved else 0)
            peaks = self.engine.all_gather((peak, max(1, result.longest_batch)))
            if budget.confirm(*max(peaks, key=lambda found: found[0] / found[1])):
                self.console.print(f"took more than foreseen: {budget.words}")

    def _count_skipped(self, result: StepResult, norms: Sequence[float]) -> None:
        """Note skipped updates, and stop each prompt that has too many in a row.

        Equal on all ranks, because sums and replicas are.
        """
        limit = self.config.training.max_skipped_updates
        for k, (name, skipped, norm) in enumerate(
            zip(self.bank.names, result.skipped, norms, strict=True)
        ):
            if not skipped and math.isfinite(norm):
                self.progress.skipped_in_a_row[name] = 0
                continue
            row = self.progress.skipped_in_a_row.get(name, 0) + 1
            self.progress.skipped_in_a_row[name] = row
            self.progress.skipped[name] = self.progress.skipped.get(name, 0) + 1
            self.console.warn(
                f"step {self.progress.step}: loss or gradient of prompt {name!r} is not finite; "
                f"its update was left out on all ranks ({row} in a row)"
            )
            if row >= limit:
                self._stop(k, "diverged")
                self.console.warn(
                    f"{self._divergence([name])}; it is stopped (other prompts continue)"
                )

    def _divergence(self, names: Sequence[str]) -> str:
        limit = self.config.training.max_skipped_updates
        return (
            f"prompt {', '.join(map(repr, names))}: {limit} updates in a row were not finite "
            f"(training.max_skipped_updates={limit}); lower its learning_rate, or look for damaged "
            "rows or weights"
        )

    def _raise_if_all_diverged(self) -> None:
        diverged = [n for n, end in self.progress.stopped.items() if end["reason"] == "diverged"]
        if len(diverged) == len(self.bank):
            raise Diverged(
                f"{self._divergence(diverged)}; no prompt is left, and the last checkpoint is "
                "from before"
            )

    def _stop(self, k: int, reason: str) -> None:
        """From now on prompt ``k`` costs nothing: no rows, no encoder, no validation."""
        self.bank.stop(k)
        step = self.progress.step
        self.progress.stopped[self.bank.names[k]] = {"step": step, "reason": reason}

    def _log_step(
        self,
        result: StepResult,
        norms: Sequence[float],
        rates: Sequence[float],
        seconds: float,
        gathered: int,
        waited: float,
    ) -> None:
        step, tokens = self.progress.step, self.progress.prompt_tokens
        for i, name in enumerate(self.bank.names):
            if not math.isnan(result.losses[i]) or result.skipped[i]:
                metrics = {
                    "train_loss": result.losses[i],
                    "grad_norm": norms[i],
                    "learning_rate": rates[i],
                    "skipped_updates": self.progress.skipped.get(name, 0),
                }
                self.log(step, tokens.get(name, 0), metrics, name)
            if math.isfinite(result.losses[i]):
                total, count = self.progress.train_losses.get(name, (0.0, 0))
                self.progress.train_losses[name] = (total + result.losses[i], count + 1)
        speed = {
            "useful_tokens_per_second": result.useful_tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "gathered_bytes": gathered,
        }
        self.log(step, self.progress.useful_tokens, speed, None)

    def _due(self) -> list[int]:
        """Prompts to validate now: all at intervals and rungs, each at its own last step."""
        step = self.progress.step
        every = step % self.config.evaluation.every == 0 or step in self._rungs
        active = [k for k, active in enumerate(self.bank.active) if active]
        return [k for k in active if every or step == self._steps[k]]

    def _evaluate(self) -> None:
        """Validate the prompts that are due; keep the best; stop those whose time has come."""
        due = self._due()
        if not due:
            return
        if len(set(self.engine.all_gather(self.bank.digest()))) > 1:
            raise RuntimeError(
                "the prompts of this run differ between ranks; all devices must be of one kind"
            )
        requests = [
            self._request(k, split) for k in due for split in self.tasks[self._task(k)].evaluation
        ]
        what = f"validation at step {self.progress.step}"
        results = self._score(what, requests, self.bank.judged()) if requests else []
        self.progress.validations += 1
        scores = {
            k: merge_scores(
                (request.rows.split, result.scores)
                for request, result in zip(requests, results, strict=True)
                if request.prompt == k
            )
            for k in due
        }
        self.bank.keep_best_readers(
            self.progress.step, {k: self._key(k, scores[k]) if scores[k] else None for k in due}
        )
        validation = {
            request.prompt: result
            for request, result in zip(requests, results, strict=True)
            if request.rows.split == VALIDATION
        }
        for k in due:
            self._judge(k, scores[k], validation.get(k))
        if self.progress.step in self._rungs:
            self._halve(scores)
        for k in due:
            if self.bank.active[k] and self.progress.step == self._steps[k]:
                self._stop(k, "finished")

    def _judge(self, k: int, scores: Scores, validation: Scored | None) -> None:
        name, step = self.bank.names[k], self.progress.step
        if not scores:  # a task without validation: the last prompt is the best we know
            self.bank.keep_best(k)
            return
        scores = scores | gaps(scores, *self.progress.train_losses.pop(name, (0.0, 0)))
        shown = {key: x for key, x in scores.items() if not key.endswith(STANDARD_ERROR)}
        self.log(step, self.progress.prompt_tokens.get(name, 0), shown, name)
        stopping = self.stopping[name]
        if stopping.update(step, self._key(k, scores)):
            self.bank.keep_best(k)
            self.progress.scores[name] = scores
            assert validation is not None, "a prompt is ranked by its validation rows"
            rows = self.tasks[self._task(k)].evaluation[VALIDATION]
            self._keep_predictions(name, step, rows, validation)
        self.console.print(f"step {step}  {name}: {self._described(k, scores)}")
        if stopping.should_stop:
            self._stop(k, "early_stopping")
            self.console.print(
                f"step {step}  {name}: stopped early, best at step {stopping.best_step}"
            )

    def _halve(self, scores: Mapping[int, Scores]) -> None:
        """Stop the worst of each task's prompts that are still training, ranked by these scores.

        Prompts that learn labels are compared with each other, and so are those of one teacher:
        the losses of others are not comparable.
        """
        halving, step = self.config.search.halving, self.progress.step
        assert halving is not None
        on = [k for k in scores if self.bank.active[k] and self._steps[k] > step]
        rivals: dict[tuple[str, str | None], dict[int, tuple[float, float, int]]] = {}
        for k in on:
            prompt = self.config.prompts[k]
            group = rivals.setdefault((prompt.task, prompt.teacher), {})
            group[k] = (*self._key(k, scores[k]), prompt.num_virtual_tokens)
        for (task, _), keys in rivals.items():
            out = worst(keys, halving.eta)
            for k in out:
                self._stop(k, "halving")
            if out:
                metric = f"validation_{self.tasks[task].task.metric}"
                stopped = ", ".join(
                    f"{self.bank.names[k]} ({format_score(metric, scores[k].get(metric))})"
                    for k in out
                )
                kept = f"{len(keys) - len(out)} of {len(keys)}"
                self.console.print(
                    f"step {step}  {task}: halving keeps {kept} prompts; stopped: {stopped}"
                )

    def _task(self, k: int) -> str:
        return self.config.prompts[k].task

    def _metric(self, k: int) -> str:
        return self.tasks[self._task(k)].task.metric

    def _described(self, k: int, scores: Scores) -> str:
        distilled = self.config.prompts[k].objective == "distill"
        sets = self.tasks[self._task(k)].evaluation
        num_rows = {split: len(rows.candidates) for split, rows in sets.items()}
        return describe(shown_scores(scores, distilled), self._metric(k), num_rows)

    def _key(self, k: int, scores: Mapping[str, float]) -> ScoreKey:
        """What prompt ``k`` is ranked by, with these scores; smaller is better."""
        return score_key(scores, self._metric(k))

    def _score_baselines(self) -> None:
        """Score the base model without a trained prompt: with no prompt, and with texts."""

        def score(requests: Sequence[Request]) -> list[Scored]:
            found = self._score("scoring baselines", requests, self.evaluator.teachers)
            if self.evaluator.reused:
                self.console.print(
                    f"baselines: {self.evaluator.reused} of {len(requests)} read from the cache: "
                    "an earlier run scored the same rows with the same base"
                )
            return found

        texts = {prompt.name: prompt.teacher for prompt in self.config.prompts}
        self.progress.baselines = score_baselines(self.tasks, texts, score, self.predictions)

    def _complete_predictions(self) -> None:
        """Score again what predictions lack: a file was lost, or is of another step than the best.

        That happens where a run was resumed in a copied folder, from a checkpoint that is older
        than the file, or from one of a version that kept no predictions.
        """
        baselines = {b.file: b for b in baselines_of(self.tasks) if VALIDATION in b.rows}
        expected = dict.fromkeys(baselines, 0)
        for name, rule in self.stopping.items():
            if rule.best_step is not None:
                expected[name] = rule.best_step
        found = [] if self.predictions is None else self.predictions.missing(expected)
        missing = self.engine.all_gather(found)[0]  # rank 0's
        if not missing:
            return
        requests = [
            baselines[name].request(VALIDATION, first=len(self.bank))
            if name in baselines
            else self._request(self.bank.names.index(name), VALIDATION)
            for name in missing
        ]
        tokens = [self.bank.best(k).to(self.engine.device) for k in range(len(self.bank))]
        tokens += self.evaluator.teachers
        results = self._score("scoring rows again for predictions", requests, tokens)
        for name, request, scored in zip(missing, requests, results, strict=True):
            self._keep_predictions(name, expected[name], request.rows, scored)

    def _keep_predictions(self, name: str, step: int, rows: EvalSet, scored: Scored) -> None:
        if self.predictions is not None:
            self.predictions.keep(name, step, rows, scored_columns(rows, scored))

    def _request(self, k: int, split: str) -> Request:
        data = self.tasks[self._task(k)]
        return Request(data.evaluation[split], k, data.teachers.get(self.bank.names[k]))

    def _score(
        self, what: str, requests: Sequence[Request], virtual_tokens: Sequence[SoftPrompt]
    ) -> list[Scored]:
        """Score requests with these prompts, with progress."""
        if not requests:
            return []
        with self.console.phase(what, self.evaluator.num_texts(requests), "texts") as phase:
            return self.evaluator.score(requests, virtual_tokens, phase.advance)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs except the state of the bank."""
        self.progress.phase_seconds = dict(self.times.seconds)
        return {
            "progress": vars(self.progress),
            "stopping": {name: rule.state_dict() for name, rule in self.stopping.items()},
            "feed": self.feed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.progress = TrainingProgress(**state["progress"])
        self.times.add(self.progress.phase_seconds)
        for k, name in enumerate(self.bank.names):
            self.stopping[name].load_state_dict(state["stopping"][name])
            if (best := self.progress.scores.get(name)) is not None:
                self.stopping[name].best = self._key(k, best)
        self.feed.load_state_dict(state["feed"])


def gaps(scores: Scores, train_sum: float, train_steps: int) -> Scores:
    """What tells of overfitting, in loss: validation over train, and shifted over validation.

    Args:
        train_sum, train_steps: the losses of the steps since the last validation.
    """
    found = {}
    if train_steps:
        found["generalization_gap"] = scores["validation_loss"] - train_sum / train_steps
    if "shifted_validation_loss" in scores:
        found["shift_gap"] = scores["shifted_validation_loss"] - scores["validation_loss"]
    return found
