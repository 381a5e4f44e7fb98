"""Changes of rows that do not change their answer, to measure robustness. Imports no torch."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from trainer.config import Task, split_template, template_fields
from trainer.data.dataset import ChangedRows, RowDataset

#: Share of the words of at least ``TYPO_LETTERS`` letters in which two letters change places.
TYPO_SHARE, TYPO_LETTERS = 0.15, 4


def lower_case(text: str) -> str:
    return text.lower()


def no_punctuation(text: str) -> str:
    """Remove punctuation (Unicode category P) except between two letters or digits.

    A text of punctuation alone is not changed: without it, the base would have nothing to read.
    """
    kept = [
        character
        for i, character in enumerate(text)
        if not unicodedata.category(character).startswith("P")
        or (text[i - 1 : i].isalnum() and text[i + 1 : i + 2].isalnum())
    ]
    changed = "".join(kept)
    return changed if changed.strip() else text


def typos(text: str) -> str:
    """Exchange two neighboring letters inside some words; the same text gets the same typos."""
    draw = random.Random(text)

    def change(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) < TYPO_LETTERS or draw.random() >= TYPO_SHARE:
            return word
        i = draw.randrange(1, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    return re.sub(r"[^\W\d_]+", change, text)


#: Changes of the text of a row.
CHANGES: dict[str, Callable[[str], str]] = {
    "lower_case": lower_case,
    "no_punctuation": no_punctuation,
    "typos": typos,
}


def changed_rows(rows: RowDataset, task: Task, change: str) -> ChangedRows:
    """Change the text of the input's columns, or of the user's turns; answers stay the same."""
    function = CHANGES[change]
    if task.messages is not None:
        column = task.messages

        def of_row(number: int, row: dict[str, Any]) -> dict[str, Any]:
            return row | {column: [_turn(turn, function) for turn in row[column]]}

    else:
        columns = template_fields(task.input)

        def of_row(number: int, row: dict[str, Any]) -> dict[str, Any]:
            return row | {name: function(str(row[name])) for name in columns}

    return ChangedRows(rows, of_row, change)


def templates(task: Task) -> dict[str, Task]:
    """Return the task with other input templates, by the name of the change."""
    changed = {}
    if (template := _other_order(task.input)) is not None:
        changed["input_order"] = task.model_copy(update={"input": template})
    for number, text in enumerate(task.paraphrases, 1):
        changed[f"paraphrase-{number}"] = task.model_copy(update={"input": text})
    return changed


def _turn(turn: Mapping[str, Any], function: Callable[[str], str]) -> dict[str, Any]:
    content = turn.get("content")
    if turn["role"] != "user" or content is None:
        return dict(turn)
    if isinstance(content, str):
        return {**turn, "content": function(content)}
    parts = [{**p, "text": function(p["text"])} if "text" in p else p for p in content]
    return {**turn, "content": parts}


def _other_order(template: str) -> str | None:
    """Reverse the order of a template's lines with columns.

    None with fewer than two, or if one of them has the virtual tokens, whose place would change.
    """
    lines = template.split("\n")
    with_column = [i for i, line in enumerate(lines) if template_fields(line)]
    if len(with_column) < 2 or any(split_template(lines[i]) for i in with_column):
        return None
    moved = dict(zip(with_column, reversed(with_column), strict=True))
    return "\n".join(lines[moved.get(i, i)] for i in range(len(lines)))
