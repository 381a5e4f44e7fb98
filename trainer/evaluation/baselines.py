"""Baselines of every task: the base model without a prompt and with hand-written ones, and the
majority class. Scored once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.task_data import EvalSet, TaskData
from trainer.data.teacher import Teacher
from trainer.evaluation.majority_baseline import majority_scores
from trainer.evaluation.prediction_files import (
    HAND_WRITTEN,
    MAJORITY,
    NO_PROMPT,
    TEACHER,
    baseline_file,
)
from trainer.evaluation.prediction_records import Predictions, answer_columns, scored_columns
from trainer.evaluation.scoring import Request, Scored

#: The split whose rows prompts are ranked by.
VALIDATION = "validation"


@dataclass(frozen=True)
class Baseline:
    """The base model with a fixed text in front of the rows, or none.

    Attributes:
        name: of its row in the result table and of its file of predictions.
        rows: what is read, by split.
        text: hand-written prompt; None: no prompt.
        taught: distilled prompt whose teacher this one is compared with.
        teacher: that teacher.
        reads: teacher whose text is read in front of the rows, as prompts are.
    """

    task: str
    name: str
    rows: Mapping[str, EvalSet]
    text: str | None = None
    taught: str | None = None
    teacher: Teacher | None = None
    reads: Teacher | None = None

    @property
    def file(self) -> str:
        return baseline_file(self.task, self.name)

    def request(self, split: str, first: int = 0) -> Request:
        """How to score it.

        Args:
            first: number of prompts among the virtual tokens before those of the teachers.
        """
        prompt = None if self.reads is None else first + self.reads.index
        return Request(self.rows[split], prompt, self.teacher)


def baselines_of(tasks: Mapping[str, TaskData]) -> list[Baseline]:
    """All baselines of a run that the base model has to be run for."""
    found = []
    for task, data in tasks.items():
        found.append(Baseline(task, NO_PROMPT, data.evaluation))
        for i, text in enumerate(data.task.hand_written):
            rows = {split: sets[i] for split, sets in data.hand_written.items()}
            found.append(Baseline(task, f"{HAND_WRITTEN}-{i + 1}", rows, text))
        for prompt, teacher in data.teachers.items():
            name = f"{NO_PROMPT}-{prompt}"
            found.append(Baseline(task, name, data.evaluation, taught=prompt, teacher=teacher))
        for number, teacher in enumerate(teachers_of(data), 1):
            rows = {split: sets.with_teacher(teacher) for split, sets in data.evaluation.items()}
            if rows:
                found.append(Baseline(task, f"{TEACHER}-{number}", rows, reads=teacher))
    return found


def teachers_of(data: TaskData) -> dict[Teacher, list[str]]:
    """The different teachers of a task, each with the prompts that learn from it."""
    found: dict[Teacher, list[str]] = {}
    for prompt, teacher in data.teachers.items():
        found.setdefault(teacher, []).append(prompt)
    return found


def score_baselines(
    tasks: Mapping[str, TaskData],
    texts: Mapping[str, str | None],
    score: Callable[[Sequence[Request]], list[Scored]],
    predictions: Predictions | None,
) -> dict[str, Any]:
    """Score all baselines of a run; a collective.

    Args:
        texts: the teacher's text of every distilled prompt, by its name.
        score: scores requests, with the word embeddings of the teachers as virtual tokens.
        predictions: what keeps those of the validation rows, on rank 0.

    Returns:
        For each task ``no_prompt``, ``hand_written`` and, with distilled prompts, ``untaught`` (no
        prompt, compared with the teacher of each) and ``teachers`` (their texts as prompts).
    """
    baselines = baselines_of(tasks)
    results = iter(score([b.request(split) for b in baselines for split in b.rows]))
    found: dict[str, Any] = {task: {NO_PROMPT: {}, HAND_WRITTEN: []} for task in tasks}
    for baseline in baselines:
        scored = {split: next(results) for split in baseline.rows}
        scores = merge_scores((split, result.scores) for split, result in scored.items())
        of_task = found[baseline.task]
        if baseline.taught is not None:
            of_task.setdefault("untaught", {})[baseline.taught] = scores
        elif baseline.reads is not None:
            prompts = teachers_of(tasks[baseline.task])[baseline.reads]
            about = {"text": texts.get(prompts[0]), "prompts": prompts}
            of_task.setdefault("teachers", []).append(about | scores)
        elif baseline.text is not None:
            of_task[HAND_WRITTEN].append({"text": baseline.text, **scores})
        else:
            of_task[NO_PROMPT] = scores
        if predictions is not None and VALIDATION in scored:
            rows = baseline.rows[VALIDATION]
            predictions.keep(baseline.file, 0, rows, scored_columns(rows, scored[VALIDATION]))
    return found


def add_majority(
    tasks: Mapping[str, TaskData], baselines: dict[str, Any], predictions: Predictions | None
) -> None:
    """Add the majority class to the baselines of the tasks with choices that do not have it."""
    for name, data in tasks.items():
        if data.task.choices is None or VALIDATION not in data.evaluation:
            continue
        if MAJORITY not in baselines[name]:
            baselines[name][MAJORITY] = majority_scores(data)
        file = baseline_file(name, MAJORITY)
        if predictions is not None and predictions.missing({file: 0}):
            rows = data.evaluation[VALIDATION]
            answer = baselines[name][MAJORITY]["answer"]
            predictions.keep(file, 0, rows, answer_columns(rows, answer))


def merge_scores(parts: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """``{"validation_loss": ..., "validation_accuracy": ..., "shifted_validation_loss": ...}``."""
    return {
        f"{split}_{metric}": value for split, scores in parts for metric, value in scores.items()
    }
