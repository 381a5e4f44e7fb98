"""Dialogues -> token ids, written by the tokenizer's chat template; the assistant's turns learned.

Needs a tokenizer, but no torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trainer.config import Task
from trainer.data.column_parsers import is_learned
from trainer.data.token_table import Example, TokenBlock
from trainer.data.tokenization.chat_template import (
    ChatTemplate,
    Messages,
    TemplateLimitExceeded,
    TokenSpan,
    Tools,
)
from trainer.data.tokenization.report import BEHIND_PROMPT, TokenizationReport, too_long
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Dialogue:
    """A dialogue as tokens.

    Attributes:
        spans: (start, stop) of the tokens that the assistant writes and that are learned, ascending
            and apart.
        merged: the tokenizer merges the end of a turn with the beginning of the next; each has its
            own tokens here, as in generation.
    """

    ids: list[int]
    spans: Spans
    merged: bool = False


class DialogueEncoder:
    """Encodes dialogues as the base model reads them in generation.

    A turn of the assistant that is learned begins where the generation prompt ends, which is the
    dialogue before it as ``apply_chat_template(add_generation_prompt=True)`` gives it. It ends
    where the dialogue up to that turn ends, end mark included, or where the mark of a template
    that marks these turns (``{% generation %}``) ends; such a mark may also begin later. That is
    right only if generation prompt and turn are the beginning of the whole dialogue.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        date: the day that the template reads; None: today.

    Raises:
        Endless: the template does not end.
    """

    def __init__(self, tokenizer: Any, date: datetime.date | None = None) -> None:
        self.template = ChatTemplate(tokenizer, date)
        self._encoder = TextTokenizer(tokenizer)

    def opening(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Token ids of a dialogue up to where the assistant answers, to generate from."""
        return self.template.ids(self.template.text(messages, tools, ask=True))

    def __call__(self, messages: Messages, tools: Tools = None) -> Dialogue:
        """Encode a dialogue.

        Raises:
            ValueError: the template refuses it, does not show which tokens the assistant writes, or
                ignores the tools.
            Endless: the template does not end.
        """
        whole = self.template.text(messages, tools)
        if tools and whole == self.template.text(messages):
            raise ValueError(
                "the chat template ignores the tools of this row, so the answers would call tools "
                "that no prompt defines; use a chat template that writes tools, or set tools: null "
                "in the task to learn without them"
            )
        marked = self._marked(messages, tools)
        if marked is not None:
            return self._within_marks(messages, tools, whole, marked)
        edges: list[int] = []
        for number in filter(lambda n: is_learned(messages[n]), range(len(messages))):
            opening = self._opening(messages, tools, number, whole)
            last = number == len(messages) - 1
            until = whole if last else self.template.text(messages[: number + 1], tools)
            if not (whole.startswith(until) and len(until) > len(opening)):
                raise ValueError(_rewritten(number))
            edges += (len(opening), len(until))
        return self._cut(whole, edges)

    def _marked(self, messages: Messages, tools: Tools) -> list[TokenSpan] | None:
        """What the template marks, if that is one run of tokens for each turn of the assistant."""
        marks = self.template.marked(messages, tools) or []
        # Where a mark begins on a character without a token, transformers leaves turns out.
        turns = sum(turn["role"] == "assistant" for turn in messages)
        return marks if len(marks) == turns else None

    def _within_marks(
        self, messages: Messages, tools: Tools, whole: str, marks: Sequence[TokenSpan]
    ) -> Dialogue:
        """What is marked, from the end of the generation prompt on."""
        ids, merged = self.template.ids(whole), False
        spans, edges = list[tuple[int, int]](), list[int]()
        turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        for number, mark in zip(turns, marks, strict=True):
            if not is_learned(messages[number]):
                continue
            text = self._opening(messages, tools, number, whole)
            opening = self.template.ids(text)
            merged = merged or ids[: len(opening)] != opening
            spans.append((max(mark.tokens[0], len(opening)), mark.tokens[1]))
            edges += (max(mark.characters[0], len(text)), mark.characters[1])
            if edges[-2] >= edges[-1]:
                raise ValueError(f"[{number}]: the chat template marks no token of this turn")
        return self._cut(whole, edges) if merged else Dialogue(ids, spans)

    def _opening(self, messages: Messages, tools: Tools, number: int, whole: str) -> str:
        """The generation prompt of a turn, which must be the beginning of the whole dialogue."""
        opening = self.template.text(messages[:number], tools, ask=True)
        if whole.startswith(opening):
            return opening
        pairs = enumerate(zip(opening, whole, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), len(whole))
        raise ValueError(
            f"[{number}]: the generation prompt of the chat template continues with "
            f"{opening[same : same + 30]!r} where the dialogue has other text, so generation never "
            "gives this turn; change the chat template so that both agree, or write the dialogue "
            "as text with input and target"
        )

    def _cut(self, whole: str, edges: Sequence[int]) -> Dialogue:
        """A dialogue as tokens; every second piece between the edges is learned."""
        bounds = [0, *edges, len(whole)]
        texts = [whole[start:stop] for start, stop in pairwise(bounds)]
        pieces, merged = self._encoder.pieces(texts)
        ids, spans = list[int](), list[tuple[int, int]]()
        for place, piece in enumerate(pieces):
            if place % 2 and piece:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        return Dialogue(ids, spans, merged)


def _rewritten(number: int) -> str:
    return (
        f"[{number}]: the chat template writes this turn differently once others follow, so the "
        'row has other tokens than generation gives; set "weight": 0 on this turn and, to learn '
        "it, add a row that ends with it"
    )


def encode_opening(tokenizer: Any, text: str, date: datetime.date | None = None) -> list[int]:
    """A dialogue of one user's turn, up to where the assistant answers: to generate from.

    Raises:
        BadInput: the tokenizer has no chat template, or it refuses this turn.
    """
    try:
        return DialogueEncoder(tokenizer, date).opening([{"role": "user", "content": text}])
    except TemplateLimitExceeded as error:
        raise BadInput(f"base.model: {_endless(error)}") from None
    except ValueError as error:
        raise BadInput(f"base.model: {error}") from None


def _encoder(tokenizer: Any, task: Task, date: datetime.date | None) -> DialogueEncoder:
    """The encoder of a task.

    Raises:
        BadInput: the tokenizer has no chat template, or one that does not end.
    """
    setting = f"tasks.{task.name}.messages"
    if not tokenizer.chat_template:
        raise BadInput(
            f"{setting}: the tokenizer of base.model has no chat template; use a chat model, or "
            "input and target in place of messages"
        )
    try:
        return DialogueEncoder(tokenizer, date)
    except TemplateLimitExceeded as error:
        raise BadInput(f"{setting}: {_endless(error)}") from None


def _endless(error: TemplateLimitExceeded) -> str:
    return f"the chat template of base.model {error}; repair the template"


class DialogueRowTokenizer:
    """Dialogues within ``max_length`` tokens, by the policy of the task.

    Where a dialogue is cut, its oldest turns go, but for those of the system; it begins with a
    user's turn, and its last exchange stays.

    Args:
        task: ``messages``, ``tools`` and ``too_long``.
        max_length: most tokens of a row: the context minus the virtual tokens.
        date: the day that the chat template reads; None: today.

    Raises:
        BadInput: the tokenizer has no chat template, or one that does not end.
    """

    def __init__(
        self, task: Task, tokenizer: Any, max_length: int, date: datetime.date | None = None
    ) -> None:
        self.task, self.max_length, self.date = task, max_length, date
        self.encode = _encoder(tokenizer, task, date)
        self.limit = BEHIND_PROMPT

    def __call__(
        self, first: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[TokenBlock, TokenizationReport]:
        """Examples of consecutive rows, the first of which has the number ``first``."""
        found, examples = TokenizationReport(len(rows)), list[Example]()
        for row, values in enumerate(rows, start=first):
            tools = None if self.task.tools is None else values.get(self.task.tools)
            try:
                fitted = self._fit(values[str(self.task.messages)], tools, found)
            except ValueError as error:
                found.problem(row, f"{self.task.messages}: {error}")
                continue
            except TemplateLimitExceeded as error:  # the next row would take as long
                raise BadInput(
                    f"tasks.{self.task.name}.messages: row {row + 1}: {_endless(error)}"
                ) from None
            if fitted is not None:
                examples.append(Example(tuple(fitted.ids), tuple(fitted.spans), row))
                if fitted.merged:
                    found.merge(row)
        return TokenBlock.of(examples), found

    def _fit(self, messages: Messages, tools: Tools, found: TokenizationReport) -> Dialogue | None:
        """The dialogue, whole or cut, or None if the row is skipped; raises ValueError."""
        dialogue = self.encode(messages, tools)
        if len(dialogue.ids) <= self.max_length:
            return _shown(dialogue)
        setting = f"tasks.{self.task.name}.too_long"
        if self.task.too_long == "skip":
            found.skipped += 1
            return None
        if self.task.too_long == "refuse":
            raise ValueError(too_long(len(dialogue.ids), self))
        system = next(i for i, turn in enumerate(messages) if turn["role"] != "system")
        for start in range(system + 1, len(messages)):
            if messages[start]["role"] == "user" and any(map(is_learned, messages[start:])):
                dialogue = self.encode([*messages[:system], *messages[start:]], tools)
                if len(dialogue.ids) <= self.max_length:
                    found.truncated += 1
                    return _shown(dialogue)
        raise ValueError(
            f"its last exchange that is learned has {len(dialogue.ids)} tokens; {self.max_length} "
            f"fit {self.limit}, and a turn is never cut: shorten it, or set {setting} to skip"
        )


def _shown(dialogue: Dialogue) -> Dialogue:
    if not dialogue.spans:
        raise ValueError("the chat template shows no turn of the assistant")
    return dialogue
