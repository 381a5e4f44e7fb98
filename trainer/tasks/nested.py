"""Columns whose values are neither text nor numbers: test calls, dialogues, token ids, labels.

Each has one function that gives the value in its plain form, or says what is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from trainer.config import Task, template_fields
from trainer.errors import did_you_mean
from trainer.jsonfile import parse_json
from trainer.tasks.files import shorten

ROLES = ("system", "user", "assistant", "tool")
NO_LABEL = -100  #: a position without a label, as in transformers
_INT32 = range(2**31)

Parser = Callable[[Any], Any]


def parsers(task: Task) -> dict[str, Parser]:
    """For each such column of a task: value -> plain form; raises ValueError, worded for people."""
    if task.messages is not None:
        return {task.messages: parse_messages}
    if task.tokens is not None:
        return {task.tokens.input_ids: parse_ids, task.tokens.labels: parse_labels}
    found: dict[str, Parser] = {}
    if task.choices is not None:
        parse = join_labels if task.multi_label else parse_choice
        found[template_fields(task.target)[0]] = lambda value: parse(value, task)
    if task.metric == "execution":
        found[task.tests] = parse_tests
    return found


def has_nested(task: Task) -> bool:
    """Whether a task reads columns whose values are neither text nor numbers."""
    dialogue_or_tokens = task.messages is not None or task.tokens is not None
    return dialogue_or_tokens or task.multi_label or task.metric == "execution"


def kept_nulls(task: Task) -> set[str]:
    """Columns of a table whose outermost objects keep keys that are null.

    In Arrow an object has the keys of all rows, null where its own row has none. Such keys are
    dropped at every depth. But a test call may expect null as its result, and a turn may have null
    as its content: of those ``parse_tests`` and ``parse_messages`` know the keys.
    """
    if task.messages is not None:
        return {task.messages}
    return {task.tests} if task.metric == "execution" else set()


def _from_text(value: Any, example: str) -> Any:
    """A list, or that list as JSON text: csv has nothing else."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}): {shorten(value)}; write {example}") from None


def parse_tests(value: Any) -> list[dict[str, Any]]:
    """Test calls: a list of ``{"args": [...], "result": ...}``, not empty."""
    example = '[{"args": [1, 2], "result": 3}]'
    calls = _from_text(value, example)
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{shorten(calls)} is not a list of test calls; write {example}")
    for number, call in enumerate(calls):
        if not isinstance(call, dict) or set(call) != {"args", "result"}:
            raise ValueError(
                f"[{number}] is {shorten(call)}; a test call has args and result: write {example}"
            )
        if not isinstance(call["args"], list):
            raise ValueError(
                f"[{number}].args is {shorten(call['args'])}, not a list; write {example}"
            )
    return calls


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """A dialogue: ``{"role": ..., "content": text}`` per turn, the last of the assistant.

    Further keys of a turn (``name``, ``tool_calls``) are kept for the chat template.
    """
    example = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
    turns = _from_text(value, example)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{shorten(turns)} is not a list of turns; write {example}")
    turns = [_from_text(turn, example) for turn in turns]  # tables may hold each turn as JSON
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise ValueError(
                f"[{number}] is {shorten(turn)}; a turn has role and content: {example}"
            )
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            hint = did_you_mean(str(role), ROLES)
            raise ValueError(f"[{number}].role: {role!r} is not one of {', '.join(ROLES)}{hint}")
        if not isinstance(content, str):
            raise ValueError(f"[{number}].content: {shorten(content)} is no text")
        if role != "tool" and not content.strip() and not turn.get("tool_calls"):
            raise ValueError(f"[{number}].content: is empty; fill it or remove the turn")
    if turns[0]["role"] == "assistant":
        raise ValueError("[0] is of the assistant; begin with what it answers")
    if turns[-1]["role"] != "assistant":
        raise ValueError(
            f"the last turn is of the {turns[-1]['role']}; end with the assistant's answer, "
            "which is what is learnt"
        )
    # Arrow gives every turn all keys of the column, null where it has none.
    return [{key: item for key, item in turn.items() if item is not None} for turn in turns]


def _parse_ints(value: Any, lowest: int) -> list[int]:
    ids = _from_text(value, "[1, 2, 3]")
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{shorten(ids)} is not a list of token ids; write [1, 2, 3]")
    for number, item in enumerate(ids):
        if type(item) is not int or not (item in _INT32 or item == lowest):
            raise ValueError(f"[{number}] is {shorten(item)}, no token id")
    return ids


def parse_ids(value: Any) -> list[int]:
    """Token ids, not negative, at least one."""
    return _parse_ints(value, 0)


def parse_labels(value: Any) -> list[int]:
    """Labels: a token id, or -100 where there is none."""
    return _parse_ints(value, NO_LABEL)


def problem_of_tokens(input_ids: list[int], labels: list[int]) -> str | None:
    """What is wrong between a row's ids and its labels, or None."""
    if len(input_ids) != len(labels):
        return f"has {len(input_ids)} input_ids but {len(labels)} labels; make one label per id"
    if labels[0] != NO_LABEL:
        return (
            f"labels[0] is {labels[0]}, but nothing stands in front of the first token to "
            "predict it from; make it -100"
        )
    for number, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if label not in (NO_LABEL, token):
            return (
                f"labels[{number}] is {label}, but input_ids[{number}] is {token}; a label is the "
                "id at its own place (not shifted), or -100"
            )
    if all(label == NO_LABEL for label in labels):
        return "has no label: all are -100; remove the row"
    return None


def join_labels(value: Any, task: Task) -> str:
    """The labels of a row as the text to write: each once, in the order of ``task.choices``."""
    example = json.dumps((task.choices or [])[:2])
    if isinstance(value, str) and not value.lstrip().startswith("["):
        raise ValueError(f"{shorten(value)} is text; a multi-label row has a list: {example}")
    labels = _from_text(value, example)
    if not isinstance(labels, list) or not labels:
        raise ValueError(
            f"{shorten(labels)} is not a list of labels; write {example}; for none of them, "
            "add a choice that says so"
        )
    named = {parse_choice(label, task) for label in labels}
    return task.label_separator.join(choice for choice in task.choices or [] if choice in named)


def parse_choice(value: Any, task: Task) -> str:
    """The choice of a task that a value means: ``"1"`` for 1, and for 1.0 where there is no "1.0".

    CSV files, and columns with missing numbers, write whole numbers as 1.0; JSON writes booleans as
    true and Python as True.
    """
    choices, text = task.choices or [], str(value)
    whole = re.fullmatch(r"(-?\d+)(\.0+)?", text)
    others = [whole[1], f"{whole[1]}.0"] if whole else []
    others += [text.lower()] if isinstance(value, bool) else []
    for spelling in (text, *others):
        if spelling in choices:
            return spelling
    known = ", ".join(map(repr, choices[:8])) + (", ..." if len(choices) > 8 else "")
    where = f"tasks.{task.name}.choices"
    hint = did_you_mean(text, choices)
    raise ValueError(f"{shorten(text)} is not one of {where}: {known}{hint}")


def split_labels(text: str, task: Task) -> list[str]:
    """The labels that a text written by the base names; the template's own words are left out."""
    (name,) = template_fields(task.target)
    before, _, after = task.target.partition("{" + name + "}")
    text = text.strip().removeprefix(before.strip()).removesuffix(after.strip())
    parts = text.split(task.label_separator.strip() or None)
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def content_text(row: Mapping[str, Any], columns: list[str]) -> str:
    """What makes two rows the same: the values of the columns that are read and learnt."""
    values = [row[name] for name in columns]
    return "\0".join(
        json.dumps(value, sort_keys=True) if isinstance(value, list) else str(value)
        for value in values
    )
