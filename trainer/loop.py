"""The order of events of a run. Knows no library: each line of the loop is one event.

read the rows of every active prompt
forward, backward, one all-reduce; leave out what is not finite
one optimizer step per prompt
log; stop what diverged; told to stop: save, end on all ranks together
validate what is due, keep the best, stop early or at a rung; checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.base.saved import SavedBytes
from trainer.config import RunConfig
from trainer.console import Console, StepLine
from trainer.engine import Engine
from trainer.evaluation import Evaluator, Request, Scored
from trainer.objective import StepResult, batch_gradients
from trainer.optimization import EarlyStopping
from trainer.phase_times import PhaseTimes
from trainer.prefetch import Batch, Prefetch
from trainer.prompts.bank import Bank
from trainer.ranking import ScoreKey, score_key
from trainer.result_table import DIVERGENCE, column_title, format_score, shown_scores
from trainer.search import rungs, worst
from trainer.statistics import STANDARD_ERROR
from trainer.stop import Stopped
from trainer.tasks.feed import TaskData
from trainer.tasks.streams import PromptLengths
from trainer.tasks.teacher import Teacher

Scores = dict[str, float]


class Diverged(RuntimeError):
    """Every prompt's updates were not finite too many times in a row."""


@dataclass
class Progress:
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
        saved_bytes_per_token: of the first stream, between its forward and its backward.
        log, save, between_steps: what is done with the numbers of a step, with the state of the run
            where a checkpoint is due, and after every step.
        steps_here, train_gathered_bytes, train_exchanged_bytes: since this process started, unlike
            ``progress``; the latter are part of the former.
    """

    config: RunConfig
    engine: Engine
    evaluator: Evaluator
    tasks: Mapping[str, TaskData]
    bank: Bank
    feed: Prefetch
    console: Console
    log: Callable[[int, int, Mapping[str, float], str | None], None] = _nothing
    save: Callable[[Loop], None] = _nothing
    between_steps: Callable[[], object] = _nothing
    progress: Progress = field(default_factory=Progress)
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

    def run(self) -> None:
        """Train until every prompt has stopped.

        Raises:
            Diverged: if that is because all of them have diverged.
            Stopped: if a rank was told to stop; the state of the last step is saved then.
        """
        try:
            if not self.progress.baselines:
                with self.times("baselines"):
                    self._score_baselines()
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
        finally:
            self.feed.close()

    def _goes_on(self) -> bool:
        return self.progress.step < self.last_step and any(self.bank.active)

    def _stop_if_told(self) -> None:
        """Save this step and stop, on all ranks together, if one of them was told to."""
        if self._stopping:
            self._save()
            raise Stopped

    def _save(self) -> None:
        with self.times("saving"):
            self.save(self)

    def _judge_step(self) -> None:
        """Validate what is due; told to stop meanwhile, the run goes on with just that."""
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
        batch, waited = self._next_batch(PromptLengths.of(virtual_tokens))
        saved = SavedBytes() if self.steps_here == 0 else None
        self.engine.watch_memory()
        result = batch_gradients(
            self.engine,
            self.evaluator.base,
            batch,
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

        Before the first validation: from the baselines, which read the same rows.
        """
        step, seconds = self.progress.step, self.times.seconds
        steps = self.last_step - step
        left = steps * self.progress.train_seconds / step
        validations = sum(self._is_validated(s) for s in range(step + 1, self.last_step + 1))
        if self.progress.validations:
            left += validations * seconds.get("validation", 0.0) / self.progress.validations
        else:
            arms = sum(1 + len(data.task.hand_written) for data in self.tasks.values())
            left += validations * seconds.get("baselines", 0.0) * len(self.bank) / arms
        return left

    def _is_validated(self, step: int) -> bool:
        return (
            step % self.config.evaluation.every == 0 or step in self._rungs or step in self._steps
        )

    def _next_batch(self, prompt_lengths: PromptLengths) -> tuple[Batch, float]:
        """What this step reads, and the seconds that were waited for it."""
        started = time.perf_counter()
        batch = self.feed.take(self.bank.active, prompt_lengths, self.evaluator.budget.now)
        waited = time.perf_counter() - started
        self.progress.data_wait_seconds += waited
        return batch, waited

    def _confirm_budget(self, result: StepResult, saved: SavedBytes | None) -> None:
        """Streams become shorter, on all ranks alike, where they took more than was foreseen."""
        budget = self.evaluator.budget
        if saved is not None:
            self.saved_bytes_per_token = saved.total / max(1, result.first_stream)
        if result.splits:
            budget.halve()
            self.console.warn(
                f"step {self.progress.step + 1}: {result.splits} stream(s) did not fit and were "
                f"split; streams have up to {budget.tokens:,} tokens from now on"
            )
        elif budget.ramp:
            peak = max(self.engine.peak_bytes(), saved.total if saved else 0)
            peaks = self.engine.all_gather((peak, max(1, result.longest_stream)))
            if budget.confirm(*max(peaks, key=lambda found: found[0] / found[1])):
                self.console.say(f"took more than foreseen: {budget.words}")

    def _count_skipped(self, result: StepResult, norms: Sequence[float]) -> None:
        """Note left-out updates, and stop, alone, a prompt that has too many in a row.

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
                self.console.warn(f"{self._said_diverged([name])}; it is stopped, alone")

    def _said_diverged(self, names: Sequence[str]) -> str:
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
                f"{self._said_diverged(diverged)}; no prompt is left, and the last checkpoint is "
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
            Request(rows, k, data.teachers.get(self.bank.names[k]))
            for k in due
            for data in [self.tasks[self._task(k)]]
            for rows in data.evaluation.values()
        ]
        results = self._score(f"validation at step {self.progress.step}", requests)
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
        for k in due:
            self._judge(k, scores[k])
        if self.progress.step in self._rungs:
            self._halve(scores)
        for k in due:
            if self.bank.active[k] and self.progress.step == self._steps[k]:
                self._stop(k, "finished")

    def _judge(self, k: int, scores: Scores) -> None:
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
        self.console.say(f"step {step}  {name}: {self._described(k, scores)}")
        if stopping.should_stop:
            self._stop(k, "early_stopping")
            self.console.say(
                f"step {step}  {name}: stopped early, best at step {stopping.best_step}"
            )

    def _halve(self, scores: Mapping[int, Scores]) -> None:
        """Stop the worst of each task's prompts that still train, ranked by these scores.

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
                self.console.say(
                    f"step {step}  {task}: halving keeps {kept} prompts; stopped: {stopped}"
                )

    def _task(self, k: int) -> str:
        return self.config.prompts[k].task

    def _metric(self, k: int) -> str:
        return self.tasks[self._task(k)].task.metric

    def _described(self, k: int, scores: Scores) -> str:
        distilled = self.config.prompts[k].objective == "distill"
        return describe(shown_scores(scores, distilled), self._metric(k))

    def _key(self, k: int, scores: Mapping[str, float]) -> ScoreKey:
        """What prompt ``k`` is ranked by, with these scores; smaller is better."""
        return score_key(scores, self._metric(k))

    def _score_baselines(self) -> None:
        """What the base does without a trained prompt: with none, and with hand-written ones."""
        keys: list[tuple[str, str | None]] = []
        requests: list[Request] = []
        for name, data in self.tasks.items():
            for split, rows in data.evaluation.items():
                keys.append((name, None))
                requests.append(Request(rows, None))
                texts = data.task.hand_written
                for text, written in zip(texts, data.hand_written[split], strict=True):
                    keys.append((name, text))
                    requests.append(Request(written, None))
        results = self._score("scoring baselines", requests)
        if self.evaluator.reused:
            self.console.say(
                f"baselines: {self.evaluator.reused} of {len(requests)} read from the cache: an "
                "earlier run scored the same rows with the same base"
            )
        found: dict[tuple[str, str | None], list[tuple[str, Scores]]] = {}
        for key, request, result in zip(keys, requests, results, strict=True):
            found.setdefault(key, []).append((request.rows.split, result.scores))
        for name, data in self.tasks.items():
            self.progress.baselines[name] = {
                "no_prompt": merge_scores(found.get((name, None), [])),
                "hand_written": [
                    {"text": text, **merge_scores(found.get((name, text), []))}
                    for text in data.task.hand_written
                ],
            }
        for name, data in self.tasks.items():
            if data.teachers:
                self.progress.baselines[name]["untaught"] = self._score_untaught(data)
                self.progress.baselines[name]["teachers"] = self._score_teachers(data)

    def _score_untaught(self, data: TaskData) -> dict[str, Scores]:
        """How far the base without a prompt is from the teacher of every distilled prompt."""
        requests = [
            Request(rows, None, teacher)
            for teacher in data.teachers.values()
            for rows in data.evaluation.values()
        ]
        results = self._score("comparing the base with teachers", requests)
        splits = [request.rows.split for request in requests]
        scored = list(zip(splits, (result.scores for result in results), strict=True))
        each = len(data.evaluation)
        return {
            name: merge_scores(scored[i * each : (i + 1) * each])
            for i, name in enumerate(data.teachers)
        }

    def _score_teachers(self, data: TaskData) -> list[dict[str, Any]]:
        """How well the teachers' texts themselves do, read as the prompts that learn from them are.

        Returns:
            for each different text: ``text``, ``prompts`` that learn from it, and its scores.
        """
        taught: dict[Teacher, list[str]] = {}
        for name, teacher in data.teachers.items():
            taught.setdefault(teacher, []).append(name)
        texts = {prompt.name: prompt.teacher for prompt in self.config.prompts}
        found: list[dict[str, Any]] = []
        for teacher, names in taught.items() if data.evaluation else ():
            sets = [rows.behind(teacher) for rows in data.evaluation.values()]
            requests = [Request(rows, teacher.index) for rows in sets]
            with self.console.phase("scoring a teacher"):
                results = self.evaluator.score(requests, self.evaluator.teachers)
            scores = merge_scores(
                (rows.split, result.scores) for rows, result in zip(sets, results, strict=True)
            )
            found.append({"text": texts[names[0]], "prompts": names, **scores})
        return found

    def _score(self, what: str, requests: Sequence[Request]) -> list[Scored]:
        """Scores of the requests by the prompts as they are now, with progress."""
        if not requests:
            return []
        prompts = [] if all(request.prompt is None for request in requests) else self.bank.judged()
        with self.console.phase(what, self.evaluator.num_texts(requests), "texts") as phase:
            return self.evaluator.score(requests, prompts, phase.advance)

    def state(self) -> dict[str, Any]:
        """All but the bank's tensors that going on needs, as JSON."""
        self.progress.phase_seconds = dict(self.times.seconds)
        return {
            "progress": vars(self.progress),
            "stopping": {name: rule.state() for name, rule in self.stopping.items()},
            "feed": self.feed.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.times.add(self.progress.phase_seconds)
        for k, name in enumerate(self.bank.names):
            best = self.progress.scores.get(name)
            key = None if best is None else self._key(k, best)
            self.stopping[name].load_state(state["stopping"][name], key)
        self.feed.load_state_dict(state["feed"])


def merge_scores(parts: Any) -> Scores:
    """``{"validation_loss": ..., "validation_accuracy": ..., "shifted_validation_loss": ...}``."""
    return {
        f"{split}_{metric}": value for split, scores in parts for metric, value in scores.items()
    }


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


def describe(scores: Mapping[str, float], metric: str) -> str:
    """Return the task's metric and the losses in one line for people."""
    names = [f"validation_{metric}", f"shifted_validation_{metric}"]
    names += ["validation_loss", f"validation{DIVERGENCE}", "validation_agreement"]
    shown = [name for name in dict.fromkeys(names) if name in scores]
    return ", ".join(f"{column_title(name)} {format_score(name, scores[name])}" for name in shown)
