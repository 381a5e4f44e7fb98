"""Dialogues -> examples. The chat template writes the text; the assistant's turns are the labels.

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


@dataclass(frozen=True)
class Dialogue:
    """A dialogue as tokens.

    Attributes:
        spans: (start, stop) of the tokens of learned turns of the assistant, ascending and
            disjoint.
        merged: the tokenizer would merge the end of a turn with the beginning of the next one; they
            are tokenized separately, as in generation.
    """

    ids: list[int]
    spans: Spans
    merged: bool = False


class DialogueEncoder:
    """Encodes dialogues with the tokens that the base model reads in generation.

    The generation prompt of a turn is the dialogue before it, written by
    ``apply_chat_template(add_generation_prompt=True)``. A learned turn of the assistant begins at
    the end of its generation prompt, and ends at the end of the dialogue up to this turn, including
    the end mark. If the template marks turns (``{% generation %}``), the turn ends at the end of
    the mark, and begins at its beginning if that is later. Generation prompt and turn must be a
    prefix of the complete dialogue.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        date: the date that the template reads; None: today.

    Raises:
        TemplateLimitExceeded: as ``ChatTemplate``.
    """

    def __init__(self, tokenizer: Any, date: datetime.date | None = None) -> None:
        self.template = ChatTemplate(tokenizer, date)
        self._encoder = TextTokenizer(tokenizer)

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
        marked = self._marked(messages, tools)
        if marked is not None:
            return self._cut_at_marks(messages, tools, text, marked)
        edges: list[int] = []
        for number in filter(lambda n: is_learned(messages[n]), range(len(messages))):
            opening = self._opening(messages, tools, number, text)
            last = number == len(messages) - 1
            until = text if last else self.template.text(messages[: number + 1], tools)
            if not (text.startswith(until) and len(until) > len(opening)):
                raise ValueError(
                    f"[{number}]: the chat template writes this turn differently once others "
                    "follow, so the row has other tokens than generation gives; set "
                    '"weight": 0 on this turn and, to learn it, add a row that ends with it'
                )
            edges += (len(opening), len(until))
        return self._cut(text, edges)

    def _marked(self, messages: Messages, tools: Tools) -> list[TokenSpan] | None:
        """Return the spans that the template marks, if there is one per turn of the assistant."""
        marks = self.template.marked(messages, tools) or []
        # transformers omits turns whose mark begins on a character without a token.
        turns = sum(turn["role"] == "assistant" for turn in messages)
        return marks if len(marks) == turns else None

    def _cut_at_marks(
        self, messages: Messages, tools: Tools, text: str, marks: Sequence[TokenSpan]
    ) -> Dialogue:
        """Encode a dialogue with marks; marked tokens after the generation prompt are learned."""
        ids, merged = self.template.ids(text), False
        spans, edges = list[tuple[int, int]](), list[int]()
        turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        for number, mark in zip(turns, marks, strict=True):
            if not is_learned(messages[number]):
                continue
            opening = self._opening(messages, tools, number, text)
            opening_ids = self.template.ids(opening)
            merged = merged or ids[: len(opening_ids)] != opening_ids
            spans.append((max(mark.tokens[0], len(opening_ids)), mark.tokens[1]))
            edges += (max(mark.characters[0], len(opening)), mark.characters[1])
            if edges[-2] >= edges[-1]:
                raise ValueError(f"[{number}]: the chat template marks no token of this turn")
        return self._cut(text, edges) if merged else Dialogue(ids, spans)

    def _opening(self, messages: Messages, tools: Tools, number: int, text: str) -> str:
        """Return the generation prompt of a turn, which must be a prefix of the dialogue."""
        opening = self.template.text(messages[:number], tools, generation_prompt=True)
        if text.startswith(opening):
            return opening
        pairs = enumerate(zip(opening, text, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), len(text))
        raise ValueError(
            f"[{number}]: the generation prompt of the chat template continues with "
            f"{opening[same : same + 30]!r} where the dialogue has other text, so generation never "
            "produces this turn; change the chat template so that both agree, or write the "
            "dialogue as text with input and target"
        )

    def _cut(self, text: str, edges: Sequence[int]) -> Dialogue:
        """Tokenize the pieces between the edges separately; every second one is learned."""
        bounds = [0, *edges, len(text)]
        texts = [text[start:stop] for start, stop in pairwise(bounds)]
        pieces, merged = self._encoder.pieces(texts)
        ids, spans = list[int](), list[tuple[int, int]]()
        for place, piece in enumerate(pieces):
            if place % 2 and piece:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        return Dialogue(ids, spans, merged)


def encode_opening(tokenizer: Any, text: str, date: datetime.date | None = None) -> list[int]:
    """Encode one user's turn with the generation prompt of the assistant.

    Raises ``BadInput`` if there is no chat template, or if it fails on this turn.
    """
    try:
        return DialogueEncoder(tokenizer, date).opening([{"role": "user", "content": text}])
    except TemplateLimitExceeded as error:
        raise BadInput(f"base.model: {_limit_problem(error)}") from None
    except ValueError as error:
        raise BadInput(f"base.model: {error}") from None


def _encoder(tokenizer: Any, task: Task, date: datetime.date | None) -> DialogueEncoder:
    setting = f"tasks.{task.name}.messages"
    if not tokenizer.chat_template:
        raise BadInput(
            f"{setting}: the tokenizer of base.model has no chat template; use a chat model, or "
            "input and target in place of messages"
        )
    try:
        return DialogueEncoder(tokenizer, date)
    except TemplateLimitExceeded as error:
        raise BadInput(f"{setting}: {_limit_problem(error)}") from None


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
        self, task: Task, tokenizer: Any, max_length: int, date: datetime.date | None = None
    ) -> None:
        super().__init__(task, max_length)
        self.date = date
        self.encode = _encoder(tokenizer, task, date)

    def examples(
        self, row: int, values: Mapping[str, Any], report: TokenizationReport
    ) -> list[Example]:
        messages = values[str(self.task.messages)]
        tools = None if self.task.tools is None else values.get(self.task.tools)
        try:
            dialogue = self.encode(messages, tools)
            if len(dialogue.ids) > self.max_length:
                if not self.may_truncate(row, len(dialogue.ids), report):
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
        return [Example(tuple(dialogue.ids), tuple(dialogue.spans), row)]

    def _truncate(self, messages: Messages, tools: Tools, dialogue: Dialogue) -> Dialogue:
        """Remove as few turns as possible so that the dialogue fits; raises ``ValueError``."""
        system = next(i for i, turn in enumerate(messages) if turn["role"] != "system")
        for start in range(system + 1, len(messages)):
            if messages[start]["role"] == "user" and any(map(is_learned, messages[start:])):
                dialogue = self.encode([*messages[:system], *messages[start:]], tools)
                if len(dialogue.ids) <= self.max_length:
                    return dialogue
        raise ValueError(
            f"its last exchange that is learned has {len(dialogue.ids)} tokens; {self.max_length} "
            f"fit {self.limit}, and a turn is never cut: shorten it, or set "
            f"tasks.{self.task.name}.too_long to skip"
        )
