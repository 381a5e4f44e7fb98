"""Dialogues -> examples. The chat template writes the text; the assistant's turns are the labels.

Needs a tokenizer, but no torch.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any

from trainer.config import Task
from trainer.data.column_parsers import is_learned
from trainer.data.token_table import Example
from trainer.data.tokenization.chat_template import (
    ChatTemplate,
    Messages,
    TemplateLimitExceeded,
    TokenSpan,
    Tools,
)
from trainer.data.tokenization.row_tokenizer import RowTokenizer, TokenizationReport
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput

Spans = list[tuple[int, int]]

#: The thoughts that a generation prompt begins, or begins and ends, at its end.
_THOUGHTS = re.compile(r"<(\w+)>\s*(</\1>)?\s*\Z")
#: Dialogues that show which token follows a turn of the assistant: without and with a tool call.
_CALL = {"name": "f", "arguments": {}}
_FOLLOWED: tuple[list[dict[str, Any]], ...] = (
    [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}],
    [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "callcall0", "function": _CALL}],
        },
        {"role": "tool", "name": "f", "tool_call_id": "callcall0", "content": "x"},
    ],
)


@dataclass(frozen=True)
class Dialogue:
    """A dialogue as tokens: trunk and branches as in ``Example``.

    Attributes:
        spans: (start, stop) of the tokens of learned turns of the assistant, ascending and
            disjoint.
        merged: the tokenizer would merge the end of a turn with the beginning of the next one; they
            are tokenized separately, as in generation.
        longest: number of tokens of the longest text.
    """

    ids: list[int]
    spans: Spans
    merged: bool = False
    branches: Spans = field(default_factory=list)
    longest: int = 0


@dataclass(frozen=True)
class _Turn:
    """A learned turn: the tokens of the dialogue up to it, of which start to stop are labels."""

    ids: list[int]
    start: int
    stop: int
    merged: bool = False


class DialogueEncoder:
    """Encodes dialogues with the tokens that the base model reads and writes in generation.

    The generation prompt of a turn is the dialogue before it, written by
    ``apply_chat_template(add_generation_prompt=True)``. The labels of a turn of the assistant
    begin at the end of its generation prompt and end with the token that ends generation; without
    such a token, at the end of the dialogue up to this turn. If the template marks turns
    (``{% generation %}``), the labels begin at the beginning of the mark if that is later, and end
    at its end if no token ends generation.

    A turn is learned in the text of the complete dialogue if that begins with the dialogue up to
    the turn. Otherwise the template rewrites this turn once others follow, and the dialogue up to
    the turn is a separate text.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        date: the date that the template reads; None: today.
        variables: ``tasks.chat_template_kwargs``.
        end_ids: tokens at which generation stops, in addition to the tokenizer's EOS.

    Raises:
        TemplateLimitExceeded: as ``ChatTemplate``.
    """

    def __init__(
        self,
        tokenizer: Any,
        date: datetime.date | None = None,
        variables: Mapping[str, Any] | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        self.template = ChatTemplate(tokenizer, date, variables)
        self._encoder = TextTokenizer(tokenizer)
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._special = sorted(special, key=len, reverse=True)
        known = [i for i in sorted(end_ids) if i < len(tokenizer)]
        ends = {*tokenizer.convert_ids_to_tokens(known), tokenizer.eos_token}
        self._ends = tuple(sorted(end for end in ends if end))

    def opening(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Encode a dialogue with the generation prompt of the assistant at its end."""
        return self.template.ids(self.template.text(messages, tools, generation_prompt=True))

    def __call__(self, messages: Messages, tools: Tools = None) -> Dialogue:
        """Encode a dialogue.

        Raises:
            ValueError: the template rejects the dialogue, ignores the tools, or the tokens that the
                assistant writes cannot be determined.
            TemplateLimitExceeded: as ``ChatTemplate``.
        """
        text = self.template.text(messages, tools)
        if tools and text == self.template.text(messages):
            raise ValueError(
                "the chat template ignores the tools of this row, so the answers would call "
                "undefined tools; use a chat template that writes tools, or set tools: null in the "
                "task to learn without them"
            )
        last = len(messages) - 1
        turns = [
            self._turn(messages[: number + 1], tools, text if number == last else None)
            for number in range(len(messages))
            if is_learned(messages[number])
        ]
        trunk = turns[-1].ids
        if not is_learned(messages[last]) and _inside(full := self.template.ids(text), turns)[0]:
            trunk = full
        return _tree(trunk, turns)

    def _turn(self, messages: Messages, tools: Tools, text: str | None) -> _Turn:
        """Find the labels of the last of the messages; ``text``: the dialogue, if known."""
        number = len(messages) - 1
        opening = self.template.text(messages[:-1], tools, generation_prompt=True)
        until = self.template.text(messages, tools) if text is None else text
        continued = _continuation(opening, until)
        if continued is None:
            raise ValueError(f"[{number}]: {_mismatch(opening, until)}")
        start, stop = len(opening), len(continued)
        end = self._end(continued, start)
        if continued == until:
            marks = self._marked(messages, tools)
            if marks is not None:
                start, stop = max(start, marks[-1].characters[0]), marks[-1].characters[1]
            if end is None:
                following = self._following[bool(messages[-1].get("tool_calls"))]
                if following:
                    continued += following
                    end = len(continued)
        stop = stop if end is None else end
        if start >= stop:
            raise ValueError(f"[{number}]: the chat template marks no token of this turn")
        bounds = [0, len(opening), start, stop, len(continued)]
        texts = [continued[a:b] for a, b in pairwise(bounds)]
        (asked, before, labels, rest), merged = self._encoder.pieces(texts)
        first = len(asked) + len(before)
        ids = asked + before + labels + rest
        return _Turn(ids, first, first + len(labels), merged)

    def _end(self, text: str, start: int) -> int | None:
        """Return the index after the token at which generation stops, or None.

        Only special tokens and white space may follow it.
        """
        end, stop = None, len(text)
        while True:
            stop = len(text[:stop].rstrip())
            last = next((s for s in self._special if text.endswith(s, start, stop)), None)
            if last is None:
                return end
            end = stop if last in self._ends else end
            stop -= len(last)

    @cached_property
    def _following(self) -> tuple[str, str]:
        """The token after a turn of the assistant, without and with tool calls, if it ends turns.

        In some families (GLM) a turn has no end mark: generation stops at the token that begins the
        next turn. Empty if that token does not stop generation.
        """
        tokens = ["", ""]
        for i, followed in enumerate(_FOLLOWED):
            messages = [{"role": "user", "content": "x"}, *followed]
            with suppress(ValueError):
                until, text = self.template.text(messages[:2]), self.template.text(messages)
                rest = text[len(until) :] if text.startswith(until) else ""
                tokens[i] = next((end for end in self._ends if rest.startswith(end)), "")
        return tokens[0], tokens[1]

    def _marked(self, messages: Messages, tools: Tools) -> list[TokenSpan] | None:
        """Return the spans that the template marks, if there is one per turn of the assistant."""
        marks = self.template.marked(messages, tools) or []
        # transformers omits turns whose mark begins on a character without a token.
        turns = sum(turn["role"] == "assistant" for turn in messages)
        return marks if len(marks) == turns else None


def _tree(trunk: list[int], turns: list[_Turn]) -> Dialogue:
    """Join the dialogues up to each turn, so that their common tokens occur once."""
    turns = [turn for turn in turns if turn.start < turn.stop]
    merged, longest = any(turn.merged for turn in turns), len(trunk)
    ids, spans, branches, branch_ids = list(trunk), Spans(), Spans(), trunk
    texts = [(trunk, *_inside(trunk, turns))]
    while texts[-1][2]:
        branch_ids = texts[-1][2][-1].ids
        texts.append((branch_ids, *_inside(branch_ids, texts[-1][2])))
    for text, inside, _ in [texts[0], *reversed(texts[1:])]:  # branches in the dialogue's order
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(text, trunk, strict=False))
        shared = sum(1 for _ in pairs)
        shift, longest = len(ids) - shared, max(longest, len(text))
        if shared < len(text):
            branches.append((len(ids), shared))
            ids += text[shared:]
        for turn in inside:
            start, stop = turn.start, turn.stop
            spans += [(start, min(stop, shared))] if start < shared else []
            spans += [(max(start, shared) + shift, stop + shift)] if stop > shared else []
    return Dialogue(ids, sorted(spans), merged, branches, longest)


def _inside(text: list[int], turns: list[_Turn]) -> tuple[list[_Turn], list[_Turn]]:
    """Divide turns into those whose dialogue is the beginning of a text, and the others."""
    inside, others = list[_Turn](), list[_Turn]()
    for turn in turns:
        (inside if text[: turn.stop] == turn.ids[: turn.stop] else others).append(turn)
    return inside, others


def _continuation(opening: str, until: str) -> str | None:
    """Return the text of a dialogue up to an answer, as it continues its generation prompt.

    Some templates begin the thoughts of an answer in the generation prompt (``<think>``), or write
    an empty block of thoughts there, but write an answer without thoughts in another way. Then the
    answer follows the generation prompt without the part that the prompt has already.

    Returns:
        ``until`` if it begins with ``opening``; None if generation cannot produce the answer.
    """
    if until.startswith(opening):
        return until
    thoughts = _THOUGHTS.search(opening)
    if thoughts is None or not until.startswith(opening[: thoughts.start()].rstrip()):
        return None
    before = opening[: thoughts.start()]
    rest = until[len(before if until.startswith(before) else before.rstrip()) :]
    tag, is_closed = thoughts[1], thoughts[2] is not None
    begin, end = rf"\s*<{tag}>\s*", f"</{tag}>"
    if is_closed:
        return opening + re.sub(rf"\A{begin}{end}\s*", "", rest)
    rest = re.sub(rf"\A{begin}", "", rest)
    return opening + rest if end in rest else None


def _mismatch(opening: str, until: str) -> str:
    pairs = enumerate(zip(opening, until, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(opening), len(until)))
    return (
        f"the generation prompt of the chat template continues with "
        f"{opening[same : same + 30]!r} where the dialogue has other text, so generation never "
        "produces this turn; change chat_template_kwargs or base.chat_template so that both agree, "
        "or write the dialogue as text with input and target"
    )


def encode_opening(
    tokenizer: Any,
    text: str,
    date: datetime.date | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode one user's turn with the generation prompt of the assistant.

    Raises ``BadInput`` if there is no chat template, or if it fails on this turn.
    """
    try:
        encoder = DialogueEncoder(tokenizer, date, variables)
        return encoder.opening([{"role": "user", "content": text}])
    except TemplateLimitExceeded as error:
        raise BadInput(f"base.model: {_limit_problem(error)}") from None
    except ValueError as error:
        raise BadInput(f"base.model: {error}") from None


def _encoder(
    tokenizer: Any, task: Task, date: datetime.date | None, end_ids: Collection[int]
) -> DialogueEncoder:
    setting = f"tasks.{task.name}.messages"
    if not tokenizer.chat_template:
        raise BadInput(
            f"{setting}: the tokenizer of base.model has no chat template; use a chat model, or "
            "input and target in place of messages"
        )
    try:
        encoder = DialogueEncoder(tokenizer, date, task.chat_template_kwargs, end_ids)
    except TemplateLimitExceeded as error:
        raise BadInput(f"{setting}: {_limit_problem(error)}") from None
    unread = [name for name in task.chat_template_kwargs if not encoder.template.reads(name)]
    if unread:
        raise BadInput(
            [
                f"tasks.{task.name}.chat_template_kwargs.{name}: the chat template reads no such "
                "variable; correct the name or remove it"
                for name in unread
            ]
        )
    return encoder


def _limit_problem(error: TemplateLimitExceeded) -> str:
    return f"the chat template of base.model {error}; repair the template"


class DialogueRowTokenizer(RowTokenizer):
    """Tokenizes rows with a dialogue.

    Truncation removes the oldest turns, except those of the system. The rest begins with a user's
    turn and contains a learned turn.

    Raises:
        BadInput: the tokenizer has no chat template, or one that exceeds its limits.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        max_length: int,
        date: datetime.date | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        super().__init__(task, max_length)
        self.date, self.end_ids = date, end_ids
        self.encode = _encoder(tokenizer, task, date, end_ids)

    def examples(
        self, row: int, values: Mapping[str, Any], report: TokenizationReport
    ) -> list[Example]:
        messages = values[str(self.task.messages)]
        tools = None if self.task.tools is None else values.get(self.task.tools)
        try:
            dialogue = self.encode(messages, tools)
            if dialogue.longest > self.max_length:
                if not self.may_truncate(row, dialogue.longest, report):
                    return []
                dialogue = self._truncate(messages, tools, dialogue)
                report.truncated += 1
            if not dialogue.spans:
                raise ValueError("the chat template shows no turn of the assistant")
        except ValueError as error:
            report.add_problem(row, f"{self.task.messages}: {error}")
            return []
        except TemplateLimitExceeded as error:  # presumably on every row, so stop at once
            raise BadInput(
                f"tasks.{self.task.name}.messages: row {row + 1}: {_limit_problem(error)}"
            ) from None
        if dialogue.merged:
            report.add_merged(row)
        report.branched += bool(dialogue.branches)
        branches = tuple(dialogue.branches)
        return [Example(tuple(dialogue.ids), tuple(dialogue.spans), row, branches=branches)]

    def _truncate(self, messages: Messages, tools: Tools, dialogue: Dialogue) -> Dialogue:
        """Remove as few turns as possible so that the dialogue fits; raises ``ValueError``."""
        system = next(i for i, turn in enumerate(messages) if turn["role"] != "system")
        for start in range(system + 1, len(messages)):
            if messages[start]["role"] == "user" and any(map(is_learned, messages[start:])):
                dialogue = self.encode([*messages[:system], *messages[start:]], tools)
                if dialogue.longest <= self.max_length:
                    return dialogue
        raise ValueError(
            f"its last exchange that is learned has {dialogue.longest} tokens; {self.max_length} "
            f"fit {self.limit}, and a turn is never cut: shorten it, or set "
            f"tasks.{self.task.name}.too_long to skip"
        )
