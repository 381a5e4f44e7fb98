"""Predictions of trained prompts for rows, with the scoring and the generation of an evaluation."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import Prompt, Task
from trainer.data.column_parsers import split_labels
from trainer.data.dataset import gold_choices
from trainer.data.task_data import Candidates, EvalSet, row_room
from trainer.data.tokenization.tokenize import (
    RowProgress,
    check_vocabulary,
    no_progress,
    tokenize,
)
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request, Scored
from trainer.inference.input_rows import InputRows
from trainer.model.checkpoint_files import BaseFiles
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime.json_file import finite


@dataclass(frozen=True)
class Prediction:
    """What the base predicts for one row with one prompt.

    Attributes:
        prediction: the most likely choice, or the generated text; for sets of labels, the labels.
            None if the task has no target, the row is skipped, or no choice is the most likely
            one, because a likelihood is not a number.
        log_probability: natural logarithm of the probability of the prediction under the base,
            with its end; without a prediction, of the row itself.
        scores: log-likelihood of every choice, in nats; None without choices.
        probabilities: of every choice, given that it is one of them.
        nll: negative log-likelihood of the row's own target, in nats, summed over its tokens; None
            if the row has no target.
        skipped: the row is longer than the context, and the task skips such rows.
    """

    prediction: str | list[str] | None = None
    log_probability: float | None = None
    scores: dict[str, float] | None = None
    probabilities: dict[str, float] | None = None
    nll: float | None = None
    skipped: bool = False

    @property
    def is_undecided(self) -> bool:
        """Whether choices were scored, but none is the most likely one."""
        return self.scores is not None and self.prediction is None

    def as_json(self) -> dict[str, Any]:
        """Return the fields that have a value; None in place of NaN and infinity."""
        shown = {"prediction", "log_probability"} if self.is_undecided else set[str]()
        return {
            key: finite(value)
            for key, value in vars(self).items()
            if key in shown or (value is not None and value is not False)
        }


def encode_rows(
    files: BaseFiles,
    prompts: Sequence[Prompt],
    given: InputRows,
    positions: Collection[str],
    date: datetime.date | None,
    progress: RowProgress = no_progress,
) -> dict[str, EvalSet]:
    """Tokenize rows for each ``Prompt.placement``; rows have the length limit of training.

    Args:
        prompts: of the run; the longest one of the rows' task leaves room in the context.

    Raises:
        BadInput: rows are too long and the task refuses them, or have no tokens.
    """
    task = given.task
    of_task = [prompt for prompt in prompts if prompt.task == task.name]
    room = row_room(task, of_task, {}, files.context_length)
    by_choice = task.scored_by_likelihood
    width = len(task.choices or []) if by_choice else 1
    gold = gold_choices(given.rows, task) if by_choice else [0] * len(given.rows)
    sets = {}
    for position in sorted(positions):
        table = tokenize(
            *(given.rows, task, files.tokenizer, room),
            per_choice=by_choice,
            position=position,
            date=date,
            end_ids=files.end_ids,
            progress=progress,
        ).examples
        check_vocabulary(table, files.config.vocab_size)
        numbers = table.rows_R[::width].tolist()
        candidates = Candidates(table, width, range(len(numbers)))
        sets[position] = EvalSet(task, "data", given.rows, candidates, [gold[n] for n in numbers])
    return sets


def generates(task: Task) -> bool:
    """Whether the prediction is a generated text."""
    has_target = bool(task.target or task.messages or task.tokens)
    return has_target and (not task.scored_by_likelihood or task.metric == "exact_match")


def num_texts(requests: Sequence[Request], *, has_targets: bool) -> int:
    """Number of texts that ``predict`` reads: rows and generations."""
    return sum(
        len(request.rows.candidates)
        * (_scores_rows(request.rows.task, has_targets) + generates(request.rows.task))
        for request in requests
    )


def predict(
    evaluator: Evaluator,
    requests: Sequence[Request],
    prompts: Sequence[SoftPrompt],
    *,
    has_targets: bool,
    skip_special_tokens: bool = False,
    advance: Callable[[float], None] = lambda texts: None,
) -> list[list[Prediction]]:
    """Predict the rows of every request; a collective.

    Args:
        prompts: by ``Request.prompt``.
        has_targets: whether the rows have targets of their own.
        skip_special_tokens: leave special tokens out of generated texts.
        advance: called with the number of texts read since the last call.

    Raises:
        Stopped: as ``Evaluator.score``.
    """
    scored: list[Scored | None] = [None] * len(requests)
    due = [i for i, r in enumerate(requests) if _scores_rows(r.rows.task, has_targets)]
    if due:
        plain = [replace(requests[i], rows=_scored_only(requests[i].rows)) for i in due]
        for i, of_request in zip(due, evaluator.score(plain, prompts, advance), strict=True):
            scored[i] = of_request
    predictions = []
    for request, result in zip(requests, scored, strict=True):
        task, rows = request.rows.task, request.rows
        made = [Prediction()] * len(rows.candidates)
        if result is not None:
            made = _from_scores(task, result, has_targets=has_targets)
        if generates(task) and made:
            prompt = None if request.prompt is None else prompts[request.prompt]
            stop = evaluator.stop_criteria(task)
            texts = evaluator.generate_targets(rows, prompt, advance)
            for i, text in enumerate(texts):
                decoded = stop.text(text.ids, skip_special_tokens=skip_special_tokens)
                prediction = split_labels(decoded, task) if task.multi_label else decoded
                made[i] = replace(
                    made[i], prediction=prediction, log_probability=text.log_probability
                )
        predictions.append(made)
    evaluator.engine.end_step()
    return predictions


def _scores_rows(task: Task, has_targets: bool) -> bool:
    """Whether likelihoods of rows are computed: of choices, or of the rows' own targets."""
    return task.scored_by_likelihood or has_targets


def _scored_only(rows: EvalSet) -> EvalSet:
    """Return the rows with a metric for which nothing is generated."""
    metric = "accuracy" if rows.task.scored_by_likelihood else "loss"
    return replace(rows, task=rows.task.model_copy(update={"metric": metric}))


def _from_scores(task: Task, scored: Scored, *, has_targets: bool) -> list[Prediction]:
    assert scored.nll_R is not None
    assert scored.nll_RC is not None
    nll_R = scored.nll_R if has_targets else [None] * len(scored.nll_R)
    if not task.scored_by_likelihood:
        return [Prediction(nll=nll, log_probability=None if nll is None else -nll) for nll in nll_R]
    choices = task.choices or []
    log_likelihoods_RC = -scored.nll_RC
    rows = zip(
        scored.predicted,
        log_likelihoods_RC.tolist(),
        log_likelihoods_RC.softmax(1).tolist(),
        nll_R,
        strict=True,
    )
    return [
        Prediction(
            None if best < 0 else choices[best],
            None if best < 0 else scores[best],
            dict(zip(choices, scores, strict=True)),
            dict(zip(choices, shares, strict=True)),
            nll,
        )
        for best, scores, shares, nll in rows
    ]
