"""The first rows of every task, as the base will read them. Needs a tokenizer, but no torch."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import RunConfig, Task
from trainer.data.column_parsers import NO_LABEL
from trainer.data.dataset import RowDataset
from trainer.data.prompt_positions import with_positions
from trainer.data.splits import load_splits
from trainer.data.task_data import check_teacher, row_room
from trainer.data.teacher import teachers_of
from trainer.data.token_table import Example
from trainer.data.tokenization.tokenize import check_vocabulary, tokenize
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class PreviewText:
    """One text of a row.

    A dialogue has several if its chat template rewrites earlier turns, or if the prompts of its
    task have several positions.

    Attributes:
        row: index among all rows of the task's train files.
        where: place of the row in its file.
        split: ``train``, or ``validation`` if the row is held out.
        position: ``prompts.position``.
        labels: the token id, or -100 for a token that is not learned.
    """

    task: str
    row: int
    where: str
    split: str
    position: str
    example: Example

    @property
    def labels(self) -> list[int]:
        labels = [NO_LABEL] * self.example.num_tokens
        for start, stop in self.example.label_spans:
            labels[start:stop] = self.example.input_ids[start:stop]
        return labels

    def to_json(self) -> dict[str, Any]:
        """Return the record of ``--json``; rows count from 1, as in predictions."""
        return {
            "task": self.task,
            "row": self.row + 1,
            "where": self.where,
            "split": self.split,
            "position": self.position,
            "input_ids": list(self.example.input_ids),
            "labels": self.labels,
            "virtual_tokens_at": self.example.prompt_at,
        }


@dataclass(frozen=True)
class Preview:
    """Texts of the first rows of every task, and notes about them."""

    texts: list[PreviewText]
    notes: list[str]


def preview(
    config: RunConfig,
    tokenizer: Any,
    context_length: int,
    vocab_size: int,
    count: int,
    *,
    date: datetime.date | None = None,
    end_ids: Collection[int] = (),
) -> Preview:
    """Tokenize the first ``count`` rows of each task's train files, held-out ones included.

    Args:
        date, end_ids: as in ``load_tasks``.

    Raises:
        BadInput: with the problems of all tasks.
    """
    problems: list[str] = []
    texts, notes = list[PreviewText](), list[str]()
    config = with_positions(config, tokenizer, date)
    teachers = teachers_of(config, tokenizer, date)
    for task in config.tasks:
        prompts = [prompt for prompt in config.prompts if prompt.task == task.name]
        of_task = {p.name: teachers[p.name] for p in prompts if p.name in teachers}
        try:
            room = row_room(task, prompts, of_task, context_length)
            positions = dict.fromkeys(prompt.placement for prompt in prompts) or ["front"]
            split_rows = list(_first_rows(task, count))
            for position, (split, rows) in itertools.product(positions, split_rows):
                tokenized = tokenize(
                    rows, task, tokenizer, room, position=position, date=date, end_ids=end_ids
                )
                check_vocabulary(tokenized.examples, vocab_size)
                for name, teacher in of_task.items():
                    if teacher.position == position:
                        setting = f"prompts.{name}.teacher"
                        check_teacher(setting, teacher, rows, tokenized.examples)
                texts += _texts(task, position, split, rows, list(tokenized.examples))
                for number, what in ((tokenized.skipped, "skipped"), (tokenized.truncated, "cut")):
                    if number:
                        notes.append(f"task {task.name}: {number} of these rows: {what}: too long")
                notes += tokenized.warnings
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    order = {task.name: i for i, task in enumerate(config.tasks)}
    texts.sort(key=lambda text: (order[text.task], text.row))  # stable: texts of a row in order
    return Preview(texts, list(dict.fromkeys(notes)))


def _first_rows(task: Task, count: int) -> Iterator[tuple[str, RowDataset]]:
    """Yield the first rows of the train files by split: train, and rows held out from it."""
    splits = load_splits(task)
    names = ["train"] + (["validation"] if task.validation is None else [])
    datasets = {name: splits[name] for name in names if name in splits}
    numbered = sorted(
        (number, name, index)
        for name, rows in datasets.items()
        for index, number in enumerate(itertools.islice(rows.numbers.tolist(), count))
    )
    for name, rows in datasets.items():
        chosen = [index for _, of, index in numbered[:count] if of == name]
        if chosen:
            yield name, rows.take(np.array(chosen), f"the first {count}")


def _texts(
    task: Task, position: str, split: str, rows: RowDataset, examples: list[Example]
) -> Iterator[PreviewText]:
    for example in examples:
        number = int(rows.numbers[example.row])
        for text in example.linear():
            yield PreviewText(task.name, number, rows.where(example.row), split, position, text)
