"""Baselines of every task, scored once before the first step.

Baselines are the base model without a prompt, with each hand-written prompt and with each teacher's
text, and the majority class: the most frequent answer of the train rows, given to every row. A
prompt that scores no better than the majority class has learned nothing from the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.dataset import gold_target
from trainer.data.task_data import EvalSet, TaskData
from trainer.data.teacher import Teacher
from trainer.evaluation.metrics import choice_scores, label_set_scores
from trainer.evaluation.prediction_files import (
    HAND_WRITTEN,
    MAJORITY,
    NO_PROMPT,
    TEACHER,
    baseline_file,
)
from trainer.evaluation.prediction_records import Predictions, answer_columns, scored_columns
from trainer.evaluation.scoring import Request, Scored

#: Prompts are ranked by their scores on this split.
VALIDATION = "validation"


@dataclass(frozen=True)
class Baseline:
    """The base model with a fixed text before each row, or without one.

    Attributes:
        name: name of the baseline in the result table and of its prediction file.
        text: hand-written prompt; None: no prompt.
        distilled: name of the distilled prompt whose teacher this baseline is compared with.
        compared_with: the teacher of ``distilled``.
        prefix: teacher whose text is the prompt.
    """

    task: str
    name: str
    rows: Mapping[str, EvalSet]
    text: str | None = None
    distilled: str | None = None
    compared_with: Teacher | None = None
    prefix: Teacher | None = None

    @property
    def file(self) -> str:
        return baseline_file(self.task, self.name)

    def request(self, split: str, first: int = 0) -> Request:
        """Return the request that scores the rows of a split.

        Args:
            first: index of the first teacher among the virtual tokens.
        """
        prompt = None if self.prefix is None else first + self.prefix.index
        return Request(self.rows[split], prompt, self.compared_with)


def baselines_of(tasks: Mapping[str, TaskData]) -> list[Baseline]:
    """Return all baselines that need the base model."""
    baselines = []
    for task, data in tasks.items():
        baselines.append(Baseline(task, NO_PROMPT, data.evaluation))
        for i, text in enumerate(data.task.hand_written):
            rows = {split: sets[i] for split, sets in data.hand_written.items()}
            baselines.append(Baseline(task, f"{HAND_WRITTEN}-{i + 1}", rows, text))
        for prompt, teacher in data.teachers.items():
            rows, name = data.evaluation_at(teacher.position), f"{NO_PROMPT}-{prompt}"
            baselines.append(Baseline(task, name, rows, distilled=prompt, compared_with=teacher))
        for number, teacher in enumerate(teachers_of(data), 1):
            rows = data.evaluation_at(teacher.position)
            rows = {split: sets.with_teacher(teacher) for split, sets in rows.items()}
            if rows:
                baselines.append(Baseline(task, f"{TEACHER}-{number}", rows, prefix=teacher))
    return baselines


def teachers_of(data: TaskData) -> dict[Teacher, list[str]]:
    """Return the distinct teachers of a task, each with the prompts that learn from it."""
    prompts: dict[Teacher, list[str]] = {}
    for prompt, teacher in data.teachers.items():
        prompts.setdefault(teacher, []).append(prompt)
    return prompts


def score_baselines(
    tasks: Mapping[str, TaskData],
    texts: Mapping[str, str | None],
    score: Callable[[Sequence[Request]], list[Scored]],
    predictions: Predictions | None,
) -> dict[str, Any]:
    """Score all baselines of a run; a collective.

    Args:
        texts: the teacher's text of every distilled prompt, by its name.
        score: scores requests, with the token embeddings of the teachers as virtual tokens.
        predictions: writes predictions of the validation rows, on rank 0.

    Returns:
        Fields of ``TaskResult`` by task: ``no_prompt``, ``hand_written`` and, with distilled
        prompts, ``untaught`` (no prompt, compared with the teacher of each) and ``teachers`` (their
        texts as prompts).
    """
    baselines = baselines_of(tasks)
    results = iter(score([b.request(split) for b in baselines for split in b.rows]))
    scores_by_task: dict[str, Any] = {task: {NO_PROMPT: {}, HAND_WRITTEN: []} for task in tasks}
    for baseline in baselines:
        scored = {split: next(results) for split in baseline.rows}
        scores = merge_scores((split, result.scores) for split, result in scored.items())
        of_task = scores_by_task[baseline.task]
        if baseline.distilled is not None:
            of_task.setdefault("untaught", {})[baseline.distilled] = scores
        elif baseline.prefix is not None:
            prompts = teachers_of(tasks[baseline.task])[baseline.prefix]
            teacher = {"text": texts.get(prompts[0]), "prompts": prompts}
            of_task.setdefault("teachers", []).append(teacher | scores)
        elif baseline.text is not None:
            of_task[HAND_WRITTEN].append({"text": baseline.text, **scores})
        else:
            of_task[NO_PROMPT] = scores
        if predictions is not None and VALIDATION in scored:
            rows = baseline.rows[VALIDATION]
            predictions.keep(baseline.file, 0, rows, scored_columns(rows, scored[VALIDATION]))
    return scores_by_task


def add_majority(
    tasks: Mapping[str, TaskData], baselines: dict[str, Any], predictions: Predictions | None
) -> None:
    """Add the majority class to the baselines of every task with choices that lacks it."""
    for name, data in tasks.items():
        rows = data.evaluation.get(VALIDATION)
        if data.task.choices is None or rows is None:
            continue
        if MAJORITY not in baselines[name]:
            baselines[name][MAJORITY] = majority_scores(data)
        file, answer = baseline_file(name, MAJORITY), baselines[name][MAJORITY]["answer"]
        if predictions is not None and predictions.missing({file: 0}):
            predictions.keep(file, 0, rows, answer_columns(rows, answer))


def majority_scores(data: TaskData) -> dict[str, Any]:
    """Score the most frequent answer of the train rows on the rows of every evaluation.

    For multi-label tasks an answer is a set of labels, as text. If several answers are equally
    frequent, the first in the order of the choices is used.

    Returns:
        ``answer``, its ``train_share``, and scores such as ``validation_accuracy``.
    """
    counts = Counter(gold_target(row, data.task) for row in data.train_rows)
    order = {choice: place for place, choice in enumerate(data.task.choices or [])}
    answer, count = min(counts.items(), key=lambda item: (-item[1], order.get(item[0], 0), item[0]))
    scores = merge_scores(
        (split, score_answer(rows, answer)) for split, rows in data.evaluation.items()
    )
    return {"answer": answer, "train_share": count / counts.total(), **scores}


def score_answer(rows: EvalSet, answer: str) -> dict[str, float]:
    """Score the same answer for all rows; return scores by metric."""
    task, choices = rows.task, rows.task.choices
    assert choices is not None, "a task without choices has no majority class"
    if task.multi_label:
        columns = answer_columns(rows, answer)
        return label_set_scores(columns["prediction"], columns["target"], task)
    scores = choice_scores([choices.index(answer)] * len(rows.gold), rows.gold)
    return scores | ({"exact_match": scores["accuracy"]} if task.metric == "exact_match" else {})


def merge_scores(by_split: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return ``{"validation_loss": ..., "shifted_validation_loss": ..., ...}``."""
    return {
        f"{split}_{metric}": value for split, scores in by_split for metric, value in scores.items()
    }
