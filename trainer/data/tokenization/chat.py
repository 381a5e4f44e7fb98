"""Dialogues -> examples. The chat template writes the text; the assistant's turns are the labels.

Needs a tokenizer, but no torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from typing import Any

from trainer.data.column_parsers import content_of, is_learned
from trainer.data.tokenization.chat_template import (
    ChatTemplate,
    Messages,
    TokenSpan,
    Tools,
)
from trainer.data.tokenization.dialogue_tree import Dialogue, LearnedTurn, divide, join_turns
from trainer.data.tokenization.message_edits import MARK, count_marks
from trainer.data.tokenization.reasoning import REASONING_KEYS, ReasoningFormat
from trainer.data.tokenization.row_tokenizer import common_length
from trainer.data.tokenization.tokenizer import TextTokenizer

#: Characters at the end of a text by which it is found in what a chat template writes.
_COMPARED = 20
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

    A turn of the system or of the user may contain ``MARK`` once (``with_mark``): the place of the
    virtual tokens. The mark is not encoded, and the text after it is tokenized separately.

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
        self._reasoning = ReasoningFormat(self.template.sources)
        self._encoder = TextTokenizer(tokenizer)
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._special = sorted(special, key=len, reverse=True)
        known = [i for i in sorted(end_ids) if i < len(tokenizer)]
        ends = {*tokenizer.convert_ids_to_tokens(known), tokenizer.eos_token}
        self._ends = tuple(sorted(end for end in ends if end))
        self._last_opening = "", ""

    def opening(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Encode a dialogue with the generation prompt of the assistant at its end."""
        return self.marked_opening(messages, tools)[0]

    def marked_opening(self, messages: Messages, tools: Tools = None) -> tuple[list[int], int]:
        """As ``opening``; also returns the number of tokens before the mark."""
        text = self.template.text(messages, tools, generation_prompt=True)
        (ids,), _, place = self._pieces([text])
        return ids, place

    def fixed_after_mark(self, dialogues: Sequence[Messages]) -> list[int]:
        """Return the tokens that are the same after the mark in all openings of dialogues."""
        before, _, after = self.beginning(dialogues)[0].partition(MARK)
        # White space at the end often belongs to the following token.
        return self._encoder.pieces_after(before, [after.rstrip()])[0][0]

    def beginning(self, dialogues: Sequence[Messages]) -> tuple[str, str]:
        """Return the text with which the openings of all dialogues begin, and the first's rest."""
        texts = [self.template.text(messages, generation_prompt=True) for messages in dialogues]
        shared = min(common_length(texts[0], text) for text in texts)
        return texts[0][:shared], texts[0][shared:]

    def token_starts(self, text: str) -> list[int]:
        """Return the characters at which the tokens of a text begin."""
        return self._encoder.starts(text)

    def ids(self, text: str) -> list[int]:
        """Tokenize text that the template has written, which may contain the mark."""
        (ids,), _, _ = self._pieces([text])
        return ids

    def __call__(self, messages: Messages, tools: Tools = None) -> Dialogue:
        """Encode a dialogue.

        Raises:
            ValueError: the template rejects the dialogue, ignores the tools, or the tokens that the
                assistant writes cannot be determined.
            TemplateLimitExceeded: as ``ChatTemplate``.
        """
        text = self.template.text(messages, tools)
        self._check_tools(messages, tools, text)
        last = len(messages) - 1
        turns = [
            self._turn(messages[: number + 1], tools, text if number == last else None)
            for number in range(len(messages))
            if is_learned(messages[number])
        ]
        trunk = turns[-1].ids
        if not is_learned(messages[last]) and divide(full := self._pieces([text])[0][0], turns)[0]:
            trunk = full
        return join_turns(trunk, turns)

    def _check_tools(self, messages: Messages, tools: Tools, text: str) -> None:
        """Raise ``ValueError`` if the template ignores tools, or the results of their calls."""
        if tools and text == self.template.text(messages):
            raise ValueError(
                "the chat template ignores the tools of this row, so the answers would call "
                "undefined tools; use a chat template that writes tools, or set tools: null in the "
                "task to learn without them"
            )
        results = [
            {**turn, "content": f"{content_of(turn)} x"} if turn["role"] == "tool" else turn
            for turn in messages
        ]
        if results != list(messages) and text == self.template.text(results, tools):
            raise ValueError(
                "the chat template ignores turns of the tool, so the answers after them would be "
                "learned without the results; use a chat template that writes them, or write "
                "results as turns of the user"
            )

    def _opening(self, messages: Messages, tools: Tools) -> str:
        """Return a dialogue with the generation prompt; the choices of a row share it."""
        key = repr((messages, tools))  # 1 and True are equal, but templates write them differently
        if self._last_opening[0] != key:
            text = self.template.text(messages, tools, generation_prompt=True)
            self._last_opening = key, text
        return self._last_opening[1]

    def _turn(self, messages: Messages, tools: Tools, text: str | None) -> LearnedTurn:
        """Find the labels of the last of the messages; ``text``: the dialogue, if known."""
        number = len(messages) - 1
        opening = self._opening(messages[:-1], tools)
        until = self.template.text(messages, tools) if text is None else text
        if not until.startswith(opening):
            until = self._with_earlier(messages, tools, opening, until)
        try:
            continued = self._reasoning.continued(messages[-1], opening, until)
        except ValueError as error:
            raise ValueError(f"[{number}]: {error}") from None
        if continued.count(MARK) != count_marks(messages):
            raise ValueError(
                "the chat template does not write the turn with the virtual tokens exactly once; "
                "use another prompts.position"
            )
        start, stop = len(opening), len(continued)
        end = self._end(continued, start)
        if continued == until and (
            end is None or self.template.begins_mark_after(start, messages, tools)
        ):
            marks = self._marked(messages, tools)
            if marks is not None:
                start, stop = max(start, marks[-1].characters[0]), marks[-1].characters[1]
        following = self._following[bool(messages[-1].get("tool_calls"))]
        if end is None and following:
            continued += following
            end = len(continued)
        stop = stop if end is None else end
        if start >= stop:
            raise ValueError(f"[{number}]: the chat template marks no token of this turn")
        names, written = _called(messages[-1]), continued[start:stop]
        if any(written.count(name) < names.count(name) for name in names):
            raise ValueError(
                f"[{number}]: the chat template does not write all tool_calls of this turn; use a "
                "chat template that writes them, write calls as text in content, or set weight: 0 "
                "in this turn"
            )
        bounds = [0, len(opening), start, stop, len(continued)]
        texts = [continued[a:b] for a, b in pairwise(bounds)]
        (asked, before, labels, rest), merged, place = self._pieces(texts)
        first = len(asked) + len(before)
        ids = asked + before + labels + rest
        omits = any(text not in written for text in _optional_texts(messages[-1]))
        return LearnedTurn(ids, first, first + len(labels), merged, omits, place)

    def _with_earlier(self, messages: Messages, tools: Tools, opening: str, until: str) -> str:
        """Replace the text before an answer by that before its generation prompt, if they differ.

        Some templates write earlier turns in another way once the last one is an answer: gpt-oss
        without reasoning, Mistral without the text of the system. Returns ``until`` if it does not
        contain the previous turn with the generation prompt after it.
        """
        for previous in self._endings(messages[:-1], tools, opening):
            _, separator, rest = until.rpartition(previous)
            if separator:
                return opening + rest
        return until

    def _endings(self, messages: Messages, tools: Tools, opening: str) -> Iterator[str]:
        """Yield the last turn with the generation prompt, and the same from its content on."""
        with suppress(ValueError):  # without the last turn, the template may reject the dialogue
            before = self.template.text(messages[:-1], tools) if len(messages) > 1 else ""
            if before and opening.startswith(before):
                yield opening[len(before) :]
        content = content_of(messages[-1]).strip()
        place = opening.rfind(content)
        if content and 0 <= place < len(opening) - len(content):
            yield opening[place:]

    def _pieces(self, texts: Sequence[str]) -> tuple[list[list[int]], bool, int]:
        """Tokenize consecutive pieces, the first of which may contain the mark.

        Returns:
            The ids of each piece, whether any merges, and the number of ids before the mark.
        """
        first, mark, rest = texts[0].partition(MARK)
        if any(MARK in text for text in (rest, *texts[1:])):
            raise ValueError(
                "the virtual tokens would be after a learned turn; use another prompts.position"
            )
        if not mark:
            return *self._encoder.pieces(texts), 0
        (before,), _ = self._encoder.pieces([first])
        (after, *others), merged = self._encoder.pieces_after(first, [rest, *texts[1:]])
        return [before + after, *others], merged, len(before)

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


def _optional_texts(turn: Mapping[str, Any]) -> list[str]:
    """Return the texts of a turn that some chat templates do not write, without their beginnings.

    They are its reasoning, and text beside tool calls. Templates may change their beginnings: they
    remove white space or reasoning.
    """
    texts = [turn[key] for key in REASONING_KEYS if isinstance(turn.get(key), str)]
    if turn.get("tool_calls"):
        texts.append(content_of(turn))
    return [text.strip()[-_COMPARED:] for text in texts]


def _called(turn: Mapping[str, Any]) -> list[str]:
    """Return the names of the tools that a turn calls."""
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        return []
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [str(f["name"]) for f in functions if isinstance(f, dict) and f.get("name")]
