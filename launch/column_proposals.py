"""Guess from the rows of a data file which columns are input, target, label or dialogue."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from launch.column_sample import Column, Sample, is_number
from trainer.config.task import VIRTUAL_TOKENS

#: Maximum number of different values of a column of labels without a usual name.
_MAX_UNNAMED_LABELS = 50
#: Maximum number of words of labels with a usual name that are different in most rows.
_LABEL_WORDS = 5
#: Mean number of words of answers that are compared with generated ones.
_SHORT_ANSWER = 8
#: Share of rows in which a column repeats others.
_MOST = 0.9
#: Usual names of columns, in order of preference.
# fmt: off
LABELS = (
    "label_text", "label_name", "label", "labels", "class", "category", "intent", "topic",
    "sentiment", "target", "output", "answer", "y",
)
TARGETS = (
    "target", "output", "answer", "response", "completion", "summary", "highlights", "translation",
    "solution", "canonical_solution", "code", "label", "chosen",
)
INPUTS = (
    "text", "input", "inputs", "sentence", "question", "prompt", "instruction", "context", "title",
    "content", "document", "article", "body", "review", "query", "source", "utterance", "message",
    "premise", "hypothesis", "sentence1", "sentence2", "question1", "question2", "passage",
    "paragraph", "story", "problem",
)
# fmt: on
SYSTEM = ("system", "system_prompt")
DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
IDENTIFIERS = ("id", "idx", "index", "uuid", "guid", "url", "date", "time", "timestamp")
#: The end of names such as ``user_id``, ``Order ID`` and ``reviewerID``.
_ID = re.compile("(?i:[_ ]id)$|[a-z]I[Dd]$")


def find_label(sample: Sample) -> Column | None:
    """Return the column of labels: by name, else the last one with few different values."""
    possible = [c for c in sample.columns if c.labels is not None and len(c.labels) > 1]
    few = [c for c in possible if _has_few_values(sample, c)]
    named = [c for c in possible if c in few or _max_words(c) <= _LABEL_WORDS]
    return _preferred(named, LABELS) or next(reversed([*_no_inputs(few)]), None)


def other_labels(sample: Sample, label: Column) -> list[Column]:
    """Return the other columns that may be the labels; none if the name of ``label`` is usual."""
    if label.name.lower() in LABELS:
        return []
    few = [c for c in sample.columns if len(c.labels or ()) > 1 and _has_few_values(sample, c)]
    return [column for column in _no_inputs(few) if column is not label]


def _has_few_values(sample: Sample, column: Column) -> bool:
    most = min(_MAX_UNNAMED_LABELS, max(2, sample.rows // 4))
    return column.labels is not None and len(column.labels) <= most


def _max_words(column: Column) -> int:
    return max(len(label.split()) for label in column.labels or [""])


def find_target(sample: Sample) -> Column | None:
    """Return the column of texts to write: by name, else the last one."""
    possible = [c for c in sample.columns if 0 < c.rows == c.texts and not _is_identifier(c)]
    return _preferred(possible, TARGETS) or next(reversed([*_no_inputs(possible)]), None)


def find_inputs(sample: Sample, target: Column | None) -> list[Column]:
    """Return the columns to read: those with usual names, else all other texts.

    Only columns with usual names may be missing in some rows.
    """
    scalars = [
        c
        for c in sample.columns
        if c is not target and c.rows > 0 == c.lists + c.objects and not _is_identifier(c)
    ]
    texts = [c for c in scalars if c.texts == c.rows > c.blank]
    usual = [
        column
        for column in texts
        if column.name.lower() in INPUTS
        and not (column.name.lower() == "source" and _has_few_values(sample, column))
    ]
    if target is not None:
        usual = [column for column in usual if not _repeats(sample, column, usual, target)]
    full = [c for c in scalars if c.rows == sample.rows]
    full_texts = [c for c in texts if c in full]
    sentences = [
        column
        for column in full_texts
        if column.numbers < column.rows
        and (not _has_few_values(sample, column) or _max_words(column) > _LABEL_WORDS)
    ]
    if not any(column in full for column in usual):
        usual = [column for column in texts if column in usual or column in sentences]
    return usual or full_texts or full


def _repeats(sample: Sample, column: Column, inputs: Sequence[Column], target: Column) -> bool:
    """Whether texts of a column consist of another input and the target, as in tatsu-lab/alpaca."""

    def contains(row: dict[str, Any], other: Column) -> bool:
        part = str(row.get(other.name) or "").strip()
        return part != "" and part in str(row.get(column.name))

    return any(
        sum(contains(row, other) and contains(row, target) for row in sample.first)
        > _MOST * len(sample.first)
        for other in inputs
        if other is not column
    )


def is_continuation(inputs: Sequence[Column], target: Column) -> bool:
    """Whether targets follow inputs as they are: white space separates the two in most rows."""
    return 2 * max(target.begins_blank, inputs[-1].ends_blank) > target.rows


def is_long(target: Column) -> bool:
    """Whether texts are so long that a generated one is hardly ever equal."""
    return target.words > _SHORT_ANSWER * target.texts


def num_without(sample: Sample, column: Column) -> int:
    """Return the number of rows without a value, or with a blank one, in a column."""
    return sample.rows - column.rows + column.blank


def find_dialogue(sample: Sample) -> Column | None:
    possible = [column for column in sample.columns if column.dialogues]
    return _preferred(possible, DIALOGUES) or next(iter(possible), None)


def problem_of_dialogues(sample: Sample) -> str:
    """Say why the column with a usual name has no dialogue; empty without such a column."""
    column = _preferred([c for c in sample.columns if c.no_dialogue], DIALOGUES)
    return f"{column.name}: {column.no_dialogue}" if column else ""


def divided_dialogue(sample: Sample) -> tuple[Column, Column] | None:
    """Return the columns of questions and answers if dialogues are divided into two columns."""
    turns = [column for column in sample.columns if column.turns and not column.dialogues]
    question = _preferred(turns, ("prompt",))
    answer = _preferred(turns, ("completion", "chosen"))
    return None if question is None or answer is None else (question, answer)


def unread(sample: Sample, used: Collection[str]) -> list[str]:
    """Return the columns of texts or lists that a run file does not use, but may need."""
    return [
        column.name
        for column in sample.columns
        if column.name not in used
        and not _is_identifier(column)
        and column.name.lower() != "rejected"
        and column.words + column.lists > column.blank
        and column.numbers < column.rows
        and (column.name.lower() in SYSTEM or not _has_few_values(sample, column))
    ]


def nested(sample: Sample) -> list[Column]:
    """Return the columns of objects, which templates cannot read."""
    return [c for c in sample.columns if c.objects and not c.dialogues]


def similar_labels(labels: Collection[str]) -> list[str]:
    """Return the first labels that differ only in case or white space; empty if there are none."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(label.lower().split()), []).append(label)
    return next((group for group in groups.values() if len(group) > 1), [])


def sorted_labels(column: Column) -> list[str]:
    """Return the labels in order of appearance; numbers ascending, and 1.0 as 1 in all or none."""
    labels = list(column.labels or ())
    if not all(map(is_number, labels)):
        return labels
    integers = [re.fullmatch(r"(-?\d+)(\.0+)?", label) for label in labels]
    if all(integers):
        labels = list(dict.fromkeys(match[1] for match in integers if match))
    return sorted(labels, key=float)


def template(columns: Sequence[Column]) -> str:
    return "\n".join(f"{{{column.name}}}" for column in columns)


def _preferred(columns: Sequence[Column], names: Collection[str]) -> Column | None:
    by_name = {column.name.lower(): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _no_inputs(columns: Sequence[Column]) -> Iterator[Column]:
    return (c for c in columns if c.name.lower() not in INPUTS and not _is_identifier(c))


def _is_identifier(column: Column) -> bool:
    name = column.name
    not_in_template = name == VIRTUAL_TOKENS or not name.strip() or "{" in name
    return name.lower() in IDENTIFIERS or _ID.search(name) is not None or not_in_template
