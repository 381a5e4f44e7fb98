"""Records of predictions: one per validation row, made from the scores of a prompt or baseline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.config import Task, template_fields
from trainer.data.column_parsers import content_of, is_learned, split_labels
from trainer.data.dataset import gold_target
from trainer.data.row_validation import render
from trainer.data.task_data import EvalSet
from trainer.evaluation.metrics import f1_terms
from trainer.evaluation.prediction_files import (
    FOLDER,
    MAX_CHARACTERS,
    MAX_TEXTS,
    SHORT,
    path_of,
    step_of,
)
from trainer.evaluation.scoring import Scored
from trainer.runtime import atomic_io
from trainer.runtime.json_file import finite, to_json

#: Values of every row, by field; some long fields have only the first ``MAX_TEXTS`` rows.
Columns = dict[str, Sequence[Any]]


class Predictions:
    """Prediction files of a run; used on rank 0 only.

    Args:
        warn: called if a file cannot be written; the run continues.
    """

    def __init__(self, output_dir: Path, warn: Callable[[str], None]) -> None:
        self._output_dir, self._warn = output_dir, warn
        self._inputs: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        shutil.rmtree(self._output_dir / FOLDER, ignore_errors=True)
        self._inputs.clear()

    def keep(self, name: str, step: int, rows: EvalSet, columns: Columns) -> None:
        """Write the predictions of a prompt or baseline.

        Args:
            name: name of the prompt, or a name from ``baseline_file``.
            columns: from ``scored_columns`` or ``answer_columns``.
        """
        path = path_of(self._output_dir, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_io.replacing(path) as file:  # an earlier file is unchanged after an error
                for record in self._records(step, rows, columns):
                    line = to_json(record, ensure_ascii=False) + "\n"
                    file.write(line.encode("utf-8", "replace"))
        except OSError as error:
            self._warn(f"{path}: predictions not written: {error.strerror or error}")

    def missing(self, expected: Mapping[str, int]) -> list[str]:
        """Return the expected names whose file is missing or from another step."""
        steps = {name: step_of(path_of(self._output_dir, name)) for name in expected}
        return [name for name, step in expected.items() if steps[name] != step]

    def _records(self, step: int, rows: EvalSet, columns: Columns) -> Iterator[dict[str, Any]]:
        inputs = self._inputs_of(rows)
        task = rows.task
        short_texts = task.multi_label or (task.choices and task.metric != "exact_match")
        for i, number in enumerate(rows.row_numbers):
            record: dict[str, Any] = {"step": step, "row": number + 1}
            record |= inputs[i] if i < len(inputs) else {}
            record |= {key: _cut(values[i]) for key, values in columns.items() if i < len(values)}
            if i >= MAX_TEXTS:
                kept = SHORT if short_texts else SHORT - {"target", "prediction"}
                record = {key: value for key, value in record.items() if key in kept}
            yield record

    def _inputs_of(self, rows: EvalSet) -> list[dict[str, Any]]:
        """Place, input and target of the first rows, computed once per split of a task."""
        key = rows.task.name, rows.split
        if key not in self._inputs:
            numbers = rows.row_numbers[:MAX_TEXTS]
            self._inputs[key] = [input_fields(rows, number) for number in numbers]
        return self._inputs[key]


def input_fields(rows: EvalSet, number: int) -> dict[str, Any]:
    """Place, input and target of a row, by its index in ``rows.rows``."""
    fields = {"place": rows.rows.where(number)} | _texts(rows.rows[number], rows.task)
    return {key: _cut(value) for key, value in fields.items()}


def scored_columns(rows: EvalSet, scored: Scored) -> Columns:
    """Fields of every row, from the scores of a prompt or of the base model alone."""
    task, columns = rows.task, Columns()
    if task.scored_by_likelihood and scored.nll_RC is not None:
        choices = task.choices or []
        columns["target"] = [choices[right] for right in rows.gold]
        predicted = scored.predicted
        columns["prediction"] = [None if i < 0 else choices[i] for i in predicted]
        columns["correct"] = [a == b for a, b in zip(predicted, rows.gold, strict=True)]
        log_likelihoods_RC = -scored.nll_RC[:MAX_TEXTS]
        columns["scores"] = _by_choice(choices, log_likelihoods_RC)
        columns["probabilities"] = _by_choice(choices, log_likelihoods_RC.softmax(1))
    if scored.texts_R is not None:
        assert scored.targets_R is not None
        columns["target"], columns["prediction"] = scored.targets_R, scored.texts_R
        if task.multi_label:
            columns |= _label_columns(scored.texts_R, scored.targets_R, task)
        columns["correct"] = scored.correct_R or []
    if scored.samples_R is not None:
        columns["target"] = scored.targets_R or []
        columns["predictions"] = [[_cut(text) for text, _ in own] for own in scored.samples_R]
        columns["passed"] = [[passed for _, passed in own] for own in scored.samples_R]
    if scored.teacher_R2 is not None:
        divergence_R, agreement_R = scored.teacher_R2.T.tolist()
        columns["loss"], columns["agreement"] = finite(divergence_R), finite(agreement_R)
    elif scored.nll_R is not None:
        columns["loss"] = finite(scored.nll_R)
    if "loss" in columns:
        columns["tokens"] = rows.label_counts
    return columns


def answer_columns(rows: EvalSet, answer: str) -> Columns:
    """Fields of every row, for a baseline that always gives the same answer."""
    task = rows.task
    targets = [gold_target(rows.rows[number], task) for number in rows.row_numbers]
    if task.multi_label:  # the texts of sets of labels
        (column,) = template_fields(task.target)
        answer = render(task.target, {column: answer})
        targets = [render(task.target, {column: target}) for target in targets]
        return _label_columns([answer] * len(targets), targets, task)
    correct = [answer == target for target in targets]
    return {"target": targets, "prediction": [answer] * len(targets), "correct": correct}


def _label_columns(texts: Sequence[str], targets: Sequence[str], task: Task) -> Columns:
    predicted, gold = ([split_labels(text, task) for text in side] for side in (texts, targets))
    correct = [set(a) == set(b) for a, b in zip(predicted, gold, strict=True)]
    terms = list(zip(*f1_terms(predicted, gold), strict=True))
    return {"target": gold, "prediction": predicted, "correct": correct, "f1_terms": terms}


def _by_choice(choices: Sequence[str], values_RC: torch.Tensor) -> list[dict[str, float | None]]:
    return [dict(zip(choices, finite(row), strict=True)) for row in values_RC.tolist()]


def _texts(row: Mapping[str, Any], task: Task) -> dict[str, Any]:
    if task.tokens is not None:
        return {"input": json.dumps(row[task.tokens.input_ids])}
    if task.messages is not None:
        turns = row[task.messages]
        last = max(number for number, turn in enumerate(turns) if is_learned(turn))
        texts = [f"{turn['role']}: {content_of(turn)}" for turn in turns[:last]]
        return {"input": "\n".join(texts), "target": content_of(turns[last])}
    target = {"target": render(task.target, row)} if task.target else {}
    return {"input": render(task.input, row), **target}


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        return f"{value[:MAX_CHARACTERS]} … [{len(value)} characters]"
    return value
