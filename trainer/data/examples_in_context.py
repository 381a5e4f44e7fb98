"""Examples in context: train rows with their answers, which the base reads before a row.

A text has them before the row's own text, separated by empty lines; a dialogue as turns after those
of the system. Imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config import Task
from trainer.data.column_parsers import content_of
from trainer.data.dataset import ChangedRows, RowDataset, gold_target
from trainer.data.row_validation import render

#: Key of the examples in a row. Columns of files cannot have this name.
EXAMPLES = "\0examples"
SEPARATOR = "\n\n"


def with_examples(
    rows: RowDataset, train: RowDataset, chosen: Sequence[Sequence[int]]
) -> ChangedRows:
    """Put train rows before every row; ``chosen`` has their indices, in the order of reading."""

    def change(number: int, row: dict[str, Any]) -> dict[str, Any]:
        return row | {EXAMPLES: [train[index] for index in chosen[number]]}

    identity = [train.digest, [list(map(int, indices)) for indices in chosen]]
    return ChangedRows(rows, change, repr(identity))


def examples_text(task: Task, row: Mapping[str, Any]) -> str:
    """Return the examples of a row of input and target as text; empty without examples."""
    return "".join(
        render(task.input, example) + render(task.target, example) + SEPARATOR
        for example in row.get(EXAMPLES, ())
    )


def example_turns(task: Task, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the examples of a row as turns of a dialogue, none of which is learned."""
    turns: list[dict[str, Any]] = []
    for example in row.get(EXAMPLES, ()):
        if task.messages is None:
            turns.append({"role": "user", "content": render(task.input, example)})
            turns.append({"role": "assistant", "content": render(task.target, example)})
        else:
            turns += (turn for turn in example[task.messages] if turn["role"] != "system")
    return [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns]


def input_text(task: Task, row: Mapping[str, Any]) -> str:
    """Return the text of a row by which similar rows are retrieved: without answer and system."""
    if task.messages is None:
        return render(task.input, row)
    return "\n".join(
        content_of(turn) for turn in row[task.messages][:-1] if turn["role"] != "system"
    )


def fixed_examples(
    task: Task, train: RowDataset, count: int, seed: int, answered: RowDataset | None = None
) -> list[int]:
    """Draw train rows, with choices the same number of each class as far as possible.

    Args:
        answered: rows to be answered; equal train rows are not drawn.
    """
    equal = np.isin(train.hashes(), [] if answered is None else answered.hashes())
    order: list[int] = np.flatnonzero(~equal).tolist()
    random.Random(f"{seed} {task.name}").shuffle(order)
    if not task.scored_by_likelihood:
        return order[:count]
    by_class: dict[str, list[int]] = {}
    for index in order:
        by_class.setdefault(gold_target(train[index], task), []).append(index)
        if all(len(rows) >= count for rows in by_class.values()) and len(by_class) == len(
            task.choices or ()
        ):
            break
    drawn: list[int] = []
    while len(drawn) < count and any(by_class.values()):
        for rows in by_class.values():
            if rows and len(drawn) < count:
                drawn.append(rows.pop(0))
    return drawn
