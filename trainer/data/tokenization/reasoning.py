"""Answers as they continue their generation prompt, with the reasoning that precedes them.

Reasoning models write ``<think>reasoning</think>`` before an answer. Some chat templates begin this
block in the generation prompt, or write an empty one there, and write an answer in a dialogue in
another way: without its reasoning, or without the block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.column_parsers import content_of
from trainer.data.tokenization.template_syntax import variables

#: Keys of a turn with its reasoning, in the order of transformers.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
#: Variables by which chat templates let the base generate with or without reasoning.
_SWITCHES = ("enable_thinking", "thinking")
#: The end of a generation prompt that begins a block of reasoning, or begins and ends it.
_OPENED = re.compile(r"<([\w:]+)>(\s*)\Z")
_OF_REASONING = re.compile("think|thought|reason")
_CLOSED = re.compile(r"(?:<([\w:]+)>\s*)?</([\w:]+)>\s*\Z")
#: The same in Gemma 4, whose block has other marks.
_EMPTY_CHANNEL = re.compile(r"<\|channel>\w+\s*<channel\|>\s*\Z")


@dataclass(frozen=True)
class _Reasoning:
    """Reasoning of a turn.

    Attributes:
        text: without tags.
        in_content: whether it is in the content, before ``</tag>``.
        source: the text with the tags inside it, where the content has several blocks.
    """

    text: str
    in_content: bool
    source: str


class ReasoningFormat:
    """Finds the answer that generation writes, from what a chat template writes.

    Args:
        sources: chat templates of the tokenizer.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        text = "\n".join(sources)
        tags = dict.fromkeys(re.findall(r"<([\w:]+)>", text))
        # Others may be names of roles, such as <assistant>.
        self._tags = [tag for tag in tags if _OF_REASONING.search(tag) or f"</{tag}>" in text]
        self._usual_tag = next(filter(_OF_REASONING.search, self._tags), "think")
        read = frozenset[str]().union(*(variables(source) or () for source in sources))
        self._switches = [name for name in _SWITCHES if name in read]

    def continued(self, turn: Mapping[str, Any], opening: str, until: str) -> str:
        """Return the text of a dialogue up to an answer, as generation writes it.

        If the turn has reasoning, this is the reasoning, the end of the block and the answer.
        Otherwise it is what the chat template writes, without the part that the generation prompt
        has already.

        Args:
            turn: the answer.
            opening: the text before it, with the generation prompt at its end.
            until: the dialogue up to the answer, as the chat template writes it.

        Raises:
            ValueError: generation never writes the answer.
        """
        opened, closed = _OPENED.search(opening), _CLOSED.search(opening)
        if opened is not None and opened[1] in self._tags:
            return self._after_opened(turn, opening, until, opened)
        if closed is not None and closed[2] in self._tags:
            return self._after_closed(turn, opening, until, closed)
        empty = _EMPTY_CHANNEL.search(opening)
        if empty is not None and not until.startswith(opening):
            return self._after_channel(opening, until, empty)
        if not until.startswith(opening):
            raise ValueError(_mismatch(opening, until))
        rest, tag = until[len(opening) :], self._usual_tag
        reasoning = _reasoning(turn, tag)
        if reasoning is None or not reasoning.in_content or _has(rest, reasoning, tag):
            return until
        return opening + _of_content(content_of(turn), rest, tag)

    def _after_closed(
        self, turn: Mapping[str, Any], opening: str, until: str, closed: re.Match[str]
    ) -> str:
        """Continue a generation prompt that ends a block of reasoning."""
        reasoning = _reasoning(turn, closed[2])
        if reasoning is not None and reasoning.text:
            raise ValueError(_ruled_out(closed[0], self._switches))
        if until.startswith(opening):
            return until
        rest = _rest(opening[: closed.start()], until)
        if rest is None or closed[1] is None:
            raise ValueError(_mismatch(opening, until))
        return opening + re.sub(rf"\A\s*<{closed[1]}>\s*</{closed[2]}>\s*", "", rest)

    def _after_channel(self, opening: str, until: str, empty: re.Match[str]) -> str:
        """Continue a generation prompt with an empty block that the dialogue does not have."""
        rest = _rest(opening[: empty.start()], until)
        if rest is None:
            raise ValueError(_mismatch(opening, until))
        if rest.startswith("<|channel>"):
            raise ValueError(_ruled_out(empty[0], self._switches))
        return opening + rest

    def _after_opened(
        self, turn: Mapping[str, Any], opening: str, until: str, opened: re.Match[str]
    ) -> str:
        """Continue a generation prompt that begins a block of reasoning."""
        tag, space = opened[1], opened[2]
        reasoning = _reasoning(turn, tag)
        rest = _rest(opening[: opened.start()], until)
        if until.startswith(opening):
            rest = until[len(opening) :]
        if rest is None:
            raise ValueError(_mismatch(opening, until))
        rest = _without_beginning(rest, tag, space)
        if reasoning is None or _has(rest, reasoning, tag):
            if f"</{tag}>" not in rest:
                raise ValueError(_not_closed(tag, self._switches))
            return opening + rest
        if reasoning.in_content:
            text = _of_content(content_of(turn), rest, tag)
            return opening + _without_beginning(text, tag, space)
        rest = re.sub(rf"\A\s*</{tag}>", "", rest)  # an empty block, without the reasoning
        if "\n" not in space:
            return f"{opening}{reasoning.text}</{tag}>{rest}"
        inside, answer = reasoning.text.strip("\n"), rest.lstrip("\n")
        return f"{opening}{inside}\n</{tag}>\n\n{answer}"


def _reasoning(turn: Mapping[str, Any], tag: str) -> _Reasoning | None:
    before, end, _ = content_of(turn).rpartition(f"</{tag}>")
    if end:
        source = before.strip().removeprefix(f"<{tag}>").strip()
        return _Reasoning(source.replace(f"<{tag}>", "").strip(), True, source)
    texts = (turn.get(key) for key in REASONING_KEYS)
    text = next((t for t in texts if isinstance(t, str) and t.strip()), None)
    return None if text is None else _Reasoning(text, False, text)


def _has(rest: str, reasoning: _Reasoning, tag: str) -> bool:
    """Whether the template has written the reasoning of a turn and the end of its block."""
    texts = (reasoning.text.strip(), reasoning.source)
    return any(text in rest for text in texts) and f"</{tag}>" in rest


def _rest(before: str, until: str) -> str | None:
    """Return the part of ``until`` after ``before``, whose white space at the end is optional."""
    for beginning in (before, before.rstrip()):
        if until.startswith(beginning):
            return until[len(beginning) :]
    return None


def _without_beginning(text: str, tag: str, space: str) -> str:
    """Remove ``<tag>`` and the white space after it that the generation prompt has already."""
    begin = re.match(rf"\s*<{tag}>", text)
    if begin is None:
        return text
    text = text[begin.end() :]
    length = next(n for n in range(len(space), -1, -1) if text.startswith(space[:n]))
    return text[length:]


def _of_content(content: str, rest: str, tag: str) -> str:
    """Return the content with its reasoning, and what the template writes after the content.

    Args:
        rest: the answer as the template writes it, without the reasoning.
    """
    rest = re.sub(rf"\A\s*(<{tag}>\s*)?</{tag}>", "", rest)
    # Some templates leave out the text up to the first end of reasoning, others up to the last.
    for end in re.finditer(f"</{tag}>", content):
        answer = content[end.end() :]
        if rest.lstrip().startswith(answer.strip()):
            space = answer[: len(answer) - len(answer.lstrip())]
            return content[: end.end()] + (space + rest.lstrip() if space else rest)
    raise ValueError(
        f"the chat template changes the answer after </{tag}>, so it is unknown what generation "
        "writes; use base.chat_template with another template, or write the dialogue as text with "
        "input and target"
    )


def _ruled_out(block: str, switches: Sequence[str]) -> str:
    names = " or ".join(f"{name}: true" for name in switches)
    how = f"set chat_template_kwargs to {names}" if names else "use another base.chat_template"
    return (
        f"has reasoning, but the generation prompt of the chat template ends it with {block!r}, so "
        f"generation never produces this turn; {how} to learn with reasoning, or remove the "
        "reasoning from the row"
    )


def _not_closed(tag: str, switches: Sequence[str]) -> str:
    names = " or ".join(f"{name}: false" for name in switches)
    how = f"set chat_template_kwargs to {names}, " if names else ""
    return (
        f"the generation prompt of the chat template opens <{tag}>, and neither the row nor the "
        f"template closes it before the answer; {how}give the turn its reasoning "
        f"({REASONING_KEYS[0]}, or content or target that begins with it and </{tag}>), or use "
        "base.chat_template with a template that closes the block"
    )


def _mismatch(opening: str, until: str) -> str:
    pairs = enumerate(zip(opening, until, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(opening), len(until)))
    return (
        f"the generation prompt of the chat template continues with "
        f"{opening[same : same + 30]!r} where the dialogue has other text, so generation never "
        "produces this turn; change chat_template_kwargs or base.chat_template so that both agree, "
        "or write the dialogue as text with input and target"
    )
