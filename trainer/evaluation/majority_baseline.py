"""The majority baseline of a task with choices: always the most frequent answer of the train rows.

A prompt that scores no better has learned nothing from the inputs. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.config import Task, template_fields
from trainer.data.column_parsers import split_labels
from trainer.data.dataset import RowDataset, gold_target
from trainer.data.row_validation import render
from trainer.data.task_data import EvalSet, TaskData
from trainer.evaluation.metrics import accuracy, label_set_scores
from trainer.evaluation.statistics import STANDARD_ERROR, macro_f1


def most_frequent(rows: RowDataset, task: Task) -> tuple[str, float]:
    """Return the most frequent answer of the rows and its share; of equal ones the first choice.

    For multi-label tasks an answer is a whole set of labels, as text.
    """
    counts = Counter(gold_target(row, task) for row in rows)
    order = {choice: place for place, choice in enumerate(task.choices or [])}
    answer, count = min(counts.items(), key=lambda item: (-item[1], order.get(item[0], 0), item[0]))
    return answer, count / counts.total()


def majority_scores(data: TaskData) -> dict[str, Any]:
    """Score the most frequent answer of the train rows on the rows of every evaluation.

    Returns:
        ``answer``, its ``train_share``, and scores such as ``validation_accuracy``.
    """
    answer, share = most_frequent(data.train_rows, data.task)
    scores: dict[str, Any] = {"answer": answer, "train_share": share}
    for split, rows in data.evaluation.items():
        scores |= {f"{split}_{key}": value for key, value in score_answer(rows, answer).items()}
    return scores


def score_answer(rows: EvalSet, answer: str) -> dict[str, float]:
    """Scores of giving one answer to all rows, by the name of the metric."""
    task, choices = rows.task, rows.task.choices
    assert choices is not None, "a task without choices has no majority"
    if task.multi_label:
        written = [answer_labels(answer, task)] * len(rows.candidates)
        right = [answer_labels(target, task) for target in answers(rows)]
        return label_set_scores(written, right, task)
    predicted = [choices.index(answer)] * len(rows.gold)
    rate = accuracy(predicted, rows.gold)
    f1, error = macro_f1(predicted, rows.gold)
    scores = {"accuracy": rate, "macro_f1": f1, f"macro_f1{STANDARD_ERROR}": error}
    return scores | ({"exact_match": rate} if task.metric == "exact_match" else {})


def answers(rows: EvalSet) -> Iterator[str]:
    """The right answer of every row: one of the choices, or a set of labels as text."""
    for number in row_numbers(rows):
        yield gold_target(rows.rows[number], rows.task)


def row_numbers(rows: EvalSet) -> list[int]:
    """Number of every row that is scored, among the rows of its split."""
    candidates = rows.candidates
    first = np.asarray(candidates.kept, np.int64) * candidates.width
    numbers: list[int] = np.asarray(candidates.table.rows_R)[first].tolist()
    return numbers


def answer_labels(answer: str, task: Task) -> list[str]:
    """The labels in the text of a set of labels."""
    (column,) = template_fields(task.target)
    return split_labels(render(task.target, {column: answer}), task)
