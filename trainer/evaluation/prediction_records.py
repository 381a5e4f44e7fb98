"""Makes the predictions of a prompt or baseline from its scores and keeps them in files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.config import Task
from trainer.data.column_parsers import content_of, is_learned, split_labels
from trainer.data.row_validation import render
from trainer.data.task_data import EvalSet
from trainer.evaluation.majority_baseline import answer_labels, answers, row_numbers
from trainer.evaluation.metrics import f1_terms
from trainer.evaluation.prediction_files import (
    FOLDER,
    MOST_CHARACTERS,
    MOST_TEXTS,
    SHORT,
    path_of,
    step_of,
    write,
)
from trainer.evaluation.scoring import Scored

#: Values of the rows by field; of long ones only those of the first rows.
Columns = dict[str, Sequence[Any]]


class Predictions:
    """The files of predictions of a run; used by rank 0 alone.

    Args:
        warn: called if a file could not be written; the run continues.
    """

    def __init__(self, output_dir: Path, warn: Callable[[str], None]) -> None:
        self._output_dir, self._warn = output_dir, warn
        self._inputs: dict[str, list[dict[str, Any]]] = {}

    def clear(self) -> None:
        """Remove the files of an earlier run; called where a run begins."""
        shutil.rmtree(self._output_dir / FOLDER, ignore_errors=True)
        self._inputs.clear()

    def keep(self, name: str, step: int, rows: EvalSet, columns: Columns) -> None:
        """Write the predictions of a prompt, or of what ``baseline_file`` names.

        Args:
            step: that they are of; 0 for a baseline.
            columns: as ``scored_columns`` or ``answer_columns`` makes them.
        """
        path = path_of(self._output_dir, name)
        try:
            write(path, self._records(step, rows, columns))
        except OSError as error:
            self._warn(f"{path}: predictions not written: {error.strerror or error}")

    def missing(self, expected: Mapping[str, int]) -> list[str]:
        """Names, of those expected, whose file is missing or of another step."""
        steps = {name: step_of(path_of(self._output_dir, name)) for name in expected}
        return [name for name, step in expected.items() if steps[name] != step]

    def _records(self, step: int, rows: EvalSet, columns: Columns) -> Iterator[dict[str, Any]]:
        inputs = self._inputs_of(rows)
        task = rows.task
        short_texts = task.multi_label or (task.choices and task.metric != "exact_match")
        for i, number in enumerate(row_numbers(rows)):
            record: dict[str, Any] = {"step": step, "row": number + 1}
            record |= inputs[i] if i < len(inputs) else {}
            record |= {key: _cut(values[i]) for key, values in columns.items() if i < len(values)}
            if i >= MOST_TEXTS:
                kept = SHORT if short_texts else SHORT - {"target", "prediction"}
                record = {key: value for key, value in record.items() if key in kept}
            yield record

    def _inputs_of(self, rows: EvalSet) -> list[dict[str, Any]]:
        """Place, input and target of the first rows; equal for all prompts of a task."""
        task = rows.task
        if task.name not in self._inputs:
            found = []
            for number in row_numbers(rows)[:MOST_TEXTS]:
                texts = {"place": rows.rows.where(number)} | _texts(rows.rows[number], task)
                found.append({key: _cut(value) for key, value in texts.items()})
            self._inputs[task.name] = found
        return self._inputs[task.name]


def scored_columns(rows: EvalSet, scored: Scored) -> Columns:
    """Fields of every row from the scores of a prompt or of the base model alone."""
    task, columns = rows.task, Columns()
    if task.scored_by_likelihood and scored.nll_RC is not None:
        choices = task.choices or []
        columns["target"] = [choices[right] for right in rows.gold]
        columns["prediction"] = [choices[likeliest] for likeliest in scored.predicted]
        columns["correct"] = [a == b for a, b in zip(scored.predicted, rows.gold, strict=True)]
        log_likelihoods_RC = -scored.nll_RC[:MOST_TEXTS]
        columns["scores"] = _by_choice(choices, log_likelihoods_RC)
        columns["probabilities"] = _by_choice(choices, log_likelihoods_RC.softmax(1))
    if scored.texts_R is not None:
        assert scored.targets_R is not None
        columns |= _written_columns(task, scored.texts_R, scored.targets_R)
        columns["correct"] = scored.correct_R or []
    if scored.teacher_R2 is not None:
        columns["loss"], agreement = (_finite(values) for values in scored.teacher_R2.T.tolist())
        columns["agreement"], columns["tokens"] = agreement, rows.label_counts
    elif scored.nll_R is not None:
        columns["loss"] = _finite(scored.nll_R)
        columns["tokens"] = rows.label_counts
    return columns


def answer_columns(rows: EvalSet, answer: str) -> Columns:
    """Fields of every row for a baseline that always gives the same answer."""
    task, targets = rows.task, list(answers(rows))
    if not task.multi_label:
        correct = [answer == target for target in targets]
        return {"target": targets, "prediction": [answer] * len(targets), "correct": correct}
    labels = [answer_labels(target, task) for target in targets]
    return _label_columns([answer_labels(answer, task)] * len(labels), labels)


def _written_columns(task: Task, texts: Sequence[str], targets: Sequence[str]) -> Columns:
    if not task.multi_label:
        return {"target": targets, "prediction": texts}
    written, right = ([split_labels(t, task) for t in found] for found in (texts, targets))
    return _label_columns(written, right)


def _label_columns(written: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Columns:
    correct = [set(a) == set(b) for a, b in zip(written, right, strict=True)]
    terms = list(zip(*f1_terms(written, right), strict=True))
    return {"target": right, "prediction": written, "correct": correct, "f1_terms": terms}


def _by_choice(choices: Sequence[str], values_RC: torch.Tensor) -> list[dict[str, float | None]]:
    return [dict(zip(choices, _finite(row), strict=True)) for row in values_RC.tolist()]


def _finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [value if math.isfinite(value) else None for value in values]


def _texts(row: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Input and target of a row as the task's template writes them."""
    if task.tokens is not None:
        return {"input": json.dumps(row[task.tokens.input_ids])}
    if task.messages is not None:
        turns = row[task.messages]
        last = max(number for number, turn in enumerate(turns) if is_learned(turn))
        texts = [f"{turn['role']}: {content_of(turn)}" for turn in turns[:last]]
        return {"input": "\n".join(texts), "target": content_of(turns[last])}
    found = {"input": render(task.input, row)}
    return found | ({"target": render(task.target, row)} if task.target else {})


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        return f"{value[:MOST_CHARACTERS]} … [{len(value)} characters]"
    return value
