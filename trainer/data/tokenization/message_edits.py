"""Changes to a dialogue: text of the system, another answer, the place of the virtual tokens."""

from __future__ import annotations

from typing import Any

from trainer.data.column_parsers import content_of
from trainer.data.tokenization.chat_template import Messages

#: Marks the place of the virtual tokens in a dialogue. Three characters of the private use area: no
#: text contains this sequence, although fonts with icons use single characters of the area.
MARK = "\uf8ff\ue000\uf8ff"


def with_mark(messages: Messages, position: str) -> Messages:
    """Mark the place of the virtual tokens, ``prompts.position``; raises ``ValueError``."""
    if position == "front":
        return messages
    number = next((i for i, turn in enumerate(messages) if turn["role"] == position), None)
    if number is None and position == "user":
        raise ValueError("has no turn of the user for prompts.position: user; use front or system")
    if number is None:
        return [{"role": "system", "content": MARK}, *messages]
    return _with_text_before(messages, number, MARK)


def with_system(messages: Messages, text: str | None) -> Messages:
    """Add text of the system, before any text that the system has already."""
    if text is None:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return _with_text_before(messages, 0, f"{text}\n\n")


def with_answer(messages: Messages, answer: str) -> Messages:
    """Replace the last answer, which is then the only learned turn."""
    earlier = [
        {**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in messages[:-1]
    ]
    return [*earlier, {"role": "assistant", "content": answer}]


def _with_text_before(messages: Messages, number: int, text: str) -> Messages:
    content: Any = messages[number].get("content") or ""
    if isinstance(content, list):  # no part of its own: some templates read the first part only
        first, *rest = content
        content = [{**first, "text": text + first["text"]}, *rest]
    else:
        content = text + content
    turn = {**messages[number], "content": content}
    return [*messages[:number], turn, *messages[number + 1 :]]


def count_marks(messages: Messages) -> int:
    return sum(content_of(turn).count(MARK) for turn in messages)
