"""Parsers of columns that are neither text nor numbers: test calls, dialogues, token ids, labels.

A parser returns the value in a normal form, or raises ``ValueError`` with the mistake and a remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any

from trainer.config import Task, template_fields
from trainer.data.text_readers import shorten
from trainer.runtime.errors import did_you_mean
from trainer.runtime.json_file import parse_json

ROLES = ("system", "user", "assistant", "tool")
#: Roles of turns that are written as ``{"from": ..., "value": ...}``, as in ShareGPT.
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
    **{role: role for role in ROLES},
}
NO_LABEL = -100  #: label that is ignored, as in transformers
_INT32 = range(2**31)

Parser = Callable[[Any], Any]


def parsers(task: Task) -> dict[str, Parser]:
    """Return the parser of each such column of a task."""
    if task.messages is not None:
        dialogue: dict[str, Parser] = {task.messages: parse_messages}
        return dialogue if task.tools is None else dialogue | {task.tools: parse_tools}
    if task.tokens is not None:
        columns = task.tokens
        ids: dict[str, Parser] = {columns.input_ids: parse_ids, columns.labels: parse_labels}
        mask = columns.attention_mask
        return ids if mask is None else ids | {mask: parse_mask}
    by_column: dict[str, Parser] = {}
    if task.choices is not None:
        parse = join_labels if task.multi_label else parse_choice
        by_column[template_fields(task.target)[0]] = lambda value: parse(value, task)
    if task.metric == "execution":
        by_column[task.tests] = parse_tests
    return by_column


def has_nested(task: Task) -> bool:
    """Whether a task reads columns whose values are neither text nor numbers."""
    dialogue_or_tokens = task.messages is not None or task.tokens is not None
    return dialogue_or_tokens or task.multi_label or task.metric == "execution"


def kept_nulls(task: Task) -> set[str]:
    """Return the columns of a table whose outermost objects keep keys that are null.

    In Arrow, every object has the keys of all rows; keys that are missing in its own row are null.
    Such keys are removed at every depth, except in test calls and turns of dialogues, where the
    result or content may be null: ``parse_tests`` and ``parse_messages`` handle their keys.
    """
    if task.messages is not None:
        return {task.messages}
    return {task.tests} if task.metric == "execution" else set()


def _from_text(value: Any, example: str) -> Any:
    """Parse a value that is JSON text, as lists are in csv; return other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        if value.lstrip().startswith(("[{'", "['", "{'")):
            raise ValueError(
                f"is Python's text of a list, not JSON: {shorten(value)}; write it with json.dumps"
            ) from None
        raise ValueError(f"is not JSON ({error}): {shorten(value)}; write {example}") from None


def parse_tests(value: Any) -> list[dict[str, Any]]:
    """Parse test calls: a non-empty list of ``{"args": [...], "result": ...}``."""
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


_TURNS = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """Parse a dialogue whose last turn is the assistant's: ``{"role": ..., "content": ...}`` each.

    The content is text or a list of text parts, and may be missing in a turn with ``tool_calls``.
    ``weight`` may be 0 (the turn is not learned) or, in turns of the assistant, 1 (the default).
    Other keys of a turn (``name``, ``tool_calls``) are kept for the chat template; keys that are
    null are removed, as in transformers. Turns of ShareGPT, ``{"from": ..., "value": ...}``, are
    converted to this form.
    """
    turns = _from_text(value, _TURNS)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{shorten(turns)} is not a list of turns; write {_TURNS}")
    turns = [_turn(number, turn) for number, turn in enumerate(turns)]
    if turns[0]["role"] == "assistant":
        raise ValueError("[0] is of the assistant; begin with the turn that it answers")
    if turns[-1]["role"] != "assistant":
        raise ValueError(
            f"the last turn is of the {turns[-1]['role']}; end with the assistant's answer, "
            "which is learned"
        )
    if not any(map(is_learned, turns)):
        raise ValueError("weight: is 0 in all turns of the assistant; remove the row")
    return turns


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether the tokens of a turn are labels."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def _turn(number: int, value: Any) -> dict[str, Any]:
    turn = _from_text(value, _TURNS)  # tables may hold each turn as JSON
    if isinstance(turn, dict):
        turn = {key: item for key, item in turn.items() if item is not None}
        if {"from", "value"} <= turn.keys() and not turn.keys() & {"role", "content"}:
            turn = _of_sharegpt(number, turn)
    if not isinstance(turn, dict) or "role" not in turn:
        raise ValueError(f"[{number}] is {shorten(turn)}; a turn has role and content: {_TURNS}")
    role = turn["role"]
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise ValueError(f"[{number}].role: {role!r} is not one of {', '.join(ROLES)}{hint}")
    if "function_call" in turn:
        raise ValueError(
            f"[{number}] has function_call, an earlier form of OpenAI; write tool_calls instead"
        )
    if "content" in turn:
        turn["content"] = _content(number, turn["content"])
    elif not turn.get("tool_calls"):
        raise ValueError(f"[{number}] is {shorten(turn)}; a turn has role and content: {_TURNS}")
    text = content_of(turn)
    if role != "tool" and not text.strip() and not turn.get("tool_calls"):
        raise ValueError(f"[{number}].content: is empty; fill it or remove the turn")
    _check_weight(number, turn)
    return turn


def _of_sharegpt(number: int, turn: dict[str, Any]) -> dict[str, Any]:
    sender = turn["from"]
    if sender not in SHAREGPT_ROLES:
        hint = did_you_mean(str(sender), list(SHAREGPT_ROLES))
        known = ", ".join(SHAREGPT_ROLES)
        raise ValueError(f"[{number}].from: {sender!r} is not one of {known}{hint}")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[sender], "content": turn["value"], **rest}


def _content(number: int, content: Any) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"[{number}].content: {shorten(content)} must be a string or a list of text parts"
        )
    parts = []
    for place, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(
                f"[{number}].content[{place}]: {shorten(part)} is not a text part; write "
                '{"type": "text", "text": "Hi"}, or remove the row'
            )
        parts.append({"type": "text", "text": text})
    return parts


def content_of(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn, its parts joined; empty without content."""
    content = turn.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _check_weight(number: int, turn: Mapping[str, Any]) -> None:
    weight = turn.get("weight", 0)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"[{number}].weight: is {shorten(weight)}; it must be 1 (learn the turn) or 0 (do not)"
        )
    if weight and turn["role"] != "assistant":
        raise ValueError(
            f"[{number}].weight: is 1, but only turns of the assistant are learned; remove it"
        )


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """Parse the tools that a dialogue may call: a list of their JSON schemas, or None.

    An empty list is None: some chat templates announce tools before an empty list, too.
    """
    example = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    tools = _from_text(value, example)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{shorten(tools)} is not a list of tools; write {example}")
    tools = [_from_text(tool, example) for tool in tools]
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or not tool:
            raise ValueError(f"[{number}] is {shorten(tool)}, not a tool; write {example}")
    return tools or None


def _parse_ints(value: Any, lowest: int) -> list[int]:
    ids = _from_text(value, "[1, 2, 3]")
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{shorten(ids)} is not a list of token ids; write [1, 2, 3]")
    for number, item in enumerate(ids):
        if type(item) is not int or not (item in _INT32 or item == lowest):
            raise ValueError(f"[{number}] is {shorten(item)}, not a token id")
    return ids


def parse_ids(value: Any) -> list[int]:
    """Parse a non-empty list of token ids."""
    return _parse_ints(value, 0)


def parse_labels(value: Any) -> list[int]:
    """Parse a non-empty list of labels: token ids, or -100 to ignore a position."""
    return _parse_ints(value, NO_LABEL)


def parse_mask(value: Any) -> list[int]:
    """Parse a list of 0 and 1 (or false and true): whether each token is not padding."""
    mask = _from_text(value, "[0, 1, 1]")
    if not isinstance(mask, list) or any(item not in (0, 1) for item in mask):
        raise ValueError(f"{shorten(mask)} is not a list of 0 and 1; write [0, 1, 1]")
    return [int(item) for item in mask]


def without_padding(
    input_ids: list[int], labels: list[int], mask: list[int] | None
) -> tuple[list[int], list[int]]:
    """Remove the tokens and labels whose mask is 0.

    Raises:
        ValueError: the lists differ in length, or all tokens are padding.
    """
    if len(input_ids) != len(labels):
        raise ValueError(
            f"has {len(input_ids)} input_ids but {len(labels)} labels; make one label per id"
        )
    if mask is None:
        return input_ids, labels
    if len(mask) != len(input_ids):
        raise ValueError(
            f"has {len(input_ids)} input_ids but an attention_mask of length {len(mask)}; make "
            "one value per id"
        )
    if not any(mask):
        raise ValueError("has only padding: attention_mask is 0 everywhere; remove the row")
    return list(compress(input_ids, mask)), list(compress(labels, mask))


def problem_of_tokens(input_ids: list[int], labels: list[int]) -> str | None:
    """Describe a mismatch between a row's ids and its labels; None if there is none."""
    if labels[0] != NO_LABEL:
        return f"labels[0] is {labels[0]}, but no token precedes it to predict it; make it -100"
    for number, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if label not in (NO_LABEL, token):
            return (
                f"labels[{number}] is {label}, but input_ids[{number}] is {token}; a label is the "
                "id at the same place (not shifted), or -100"
            )
    if all(label == NO_LABEL for label in labels):
        return "has no label: all are -100; remove the row"
    return None


def join_labels(value: Any, task: Task) -> str:
    """Join the labels of a row into one text: each once, in the order of ``task.choices``."""
    example = json.dumps((task.choices or [])[:2])
    if isinstance(value, str) and not value.lstrip().startswith("["):
        raise ValueError(f"{shorten(value)} is text; a multi-label row has a list: {example}")
    labels = _from_text(value, example)
    if not isinstance(labels, list) or not labels:
        raise ValueError(
            f"{shorten(labels)} is not a list of labels; write {example}; if none applies, "
            "add a choice for that"
        )
    named = {parse_choice(label, task) for label in labels}
    return task.label_separator.join(choice for choice in task.choices or [] if choice in named)


def parse_choice(value: Any, task: Task) -> str:
    """Return the choice that a value means: ``"1"`` for 1, and for 1.0 if "1.0" is not a choice.

    In csv files and columns with missing numbers, integers may be written as 1.0. A boolean is true
    in JSON, but True in Python.
    """
    choices, text = task.choices or [], str(value)
    integer = re.fullmatch(r"(-?\d+)(\.0+)?", text)
    others = [integer[1], f"{integer[1]}.0"] if integer else []
    others += [text.lower()] if isinstance(value, bool) else []
    for spelling in (text, *others):
        if spelling in choices:
            return spelling
    if not text.strip():
        raise ValueError("is empty; give it a label or remove the row")
    known = ", ".join(map(repr, choices[:8])) + (", ..." if len(choices) > 8 else "")
    where = f"tasks.{task.name}.choices"
    hint = did_you_mean(text, choices)
    raise ValueError(f"{shorten(text)} is not one of {where}: {known}{hint}")


def split_labels(text: str, task: Task) -> list[str]:
    """Split generated text into labels, without the fixed text of the target's template."""
    (name,) = template_fields(task.target)
    before, _, after = task.target.partition("{" + name + "}")
    text = text.strip().removeprefix(before.strip()).removesuffix(after.strip())
    parts = text.split(task.label_separator.strip() or None)
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def content_text(row: Mapping[str, Any], columns: list[str]) -> str:
    """Serialize the columns that define a row's content, so that equal rows give equal text."""
    values = [row[name] for name in columns if row.get(name) is not None]
    return "\0".join(
        json.dumps(value, sort_keys=True) if isinstance(value, list) else str(value)
        for value in values
    )
