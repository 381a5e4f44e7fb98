"""Dialogues -> token ids, written by the tokenizer's chat template; the assistant's turns learnt.

Needs a tokenizer, but no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import Task
from trainer.errors import BadInput
from trainer.tasks.found import BEHIND_PROMPT, Found, too_long
from trainer.tasks.table import Block, Example, runs

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_dialogue(tokenizer: Any, messages: Messages) -> tuple[list[int], Spans]:
    """A dialogue as the chat template writes it, and which tokens the assistant writes.

    A template that marks them (``{% generation %}``) is asked. Else the dialogue is written up to
    each turn of the assistant, with the words that ask for it, and up to the end of that turn: what
    lies between is the turn, its end mark included. That is right only if each is a beginning of
    the whole dialogue, token by token, as it is in generation.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: turns of ``role`` and ``content``.

    Returns:
        (token ids, (start, stop) of the assistant's tokens, ascending)

    Raises:
        ValueError: the template refuses the dialogue, or does not show the assistant's turns.
    """
    answers = sum(turn["role"] == "assistant" for turn in messages)
    if _GENERATION.search(tokenizer.get_chat_template()) and tokenizer.is_fast:
        ids, marked = _marked(tokenizer, messages)
        # Where a mark stands on a character without a token, transformers leaves turns out.
        if len(marked) == answers:
            return ids, marked
    whole_text = _written(tokenizer, messages)
    whole = _ids(tokenizer, whole_text)
    spans: Spans = []
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        last = number == len(messages) - 1
        until = whole_text if last else _written(tokenizer, messages[: number + 1])
        opening = _written(tokenizer, messages[:number], ask=True)
        if not (whole_text.startswith(until) and until.startswith(opening)):
            raise ValueError(
                f"[{number}]: the chat template writes this turn otherwise once others follow or "
                "while it is asked for, so its tokens cannot be told; use a template that marks "
                "them with {% generation %}"
            )
        start, stop = len(_ids(tokenizer, opening)), len(_ids(tokenizer, until))
        if whole[:start] != _ids(tokenizer, opening) or whole[:stop] != _ids(tokenizer, until):
            raise ValueError(
                f"[{number}]: the tokenizer joins the end of the prompt and the beginning of this "
                "turn into one token, which it does not in generation; strip white space around "
                "its content"
            )
        spans.append((start, stop))
    return whole, spans


def encode_opening(tokenizer: Any, text: str) -> list[int]:
    """A dialogue of one user's turn, up to where the assistant answers: to generate from."""
    return _ids(tokenizer, _written(tokenizer, [{"role": "user", "content": text}], ask=True))


def check_template(tokenizer: Any, task: Task) -> None:
    """Refuse a tokenizer that cannot write dialogues.

    Raises:
        BadInput: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise BadInput(
            f"tasks.{task.name}.messages: the tokenizer of base.model has no chat template; use a "
            "chat model, or input and target in place of messages"
        )


class DialogueFitter:
    """Dialogues within ``max_length`` tokens, by the policy of the task.

    Where a dialogue is cut, its oldest turns go, but for those of the system; it begins with a
    user's turn, and its last exchange stays.

    Args:
        task: ``messages`` and ``too_long``.
        max_length: most tokens of a row: the context minus the virtual tokens.

    Raises:
        BadInput: the tokenizer has no chat template.
    """

    def __init__(self, task: Task, tokenizer: Any, max_length: int) -> None:
        check_template(tokenizer, task)
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self.limit = BEHIND_PROMPT

    def __call__(self, first: int, rows: Sequence[Mapping[str, Any]]) -> tuple[Block, Found]:
        """Examples of consecutive rows, the first of which has the number ``first``."""
        found, examples = Found(len(rows)), list[Example]()
        for row, values in enumerate(rows, start=first):
            try:
                encoded = self._fit(values[str(self.task.messages)], found)
            except ValueError as error:
                found.problem(row, f"{self.task.messages}: {error}")
                continue
            if encoded is not None:
                ids, spans = encoded
                examples.append(Example(tuple(ids), tuple(spans), row))
        return Block.of(examples), found

    def _fit(self, messages: Messages, found: Found) -> tuple[list[int], Spans] | None:
        """Ids and spans, or None if the row is skipped; raises ValueError."""
        ids, spans = encode_dialogue(self.tokenizer, messages)
        if not spans:
            raise ValueError("the chat template shows no turn of the assistant")
        if len(ids) <= self.max_length:
            return ids, spans
        setting = f"tasks.{self.task.name}.too_long"
        if self.task.too_long == "skip":
            found.skipped += 1
            return None
        if self.task.too_long == "refuse":
            raise ValueError(too_long(len(ids), self))
        system = next(i for i, turn in enumerate(messages) if turn["role"] != "system")
        for start in range(system + 1, len(messages)):
            if messages[start]["role"] == "user":
                rest = [*messages[:system], *messages[start:]]
                ids, spans = encode_dialogue(self.tokenizer, rest)
                if len(ids) <= self.max_length:
                    found.truncated += 1
                    return ids, spans
        raise ValueError(
            f"its last exchange alone has {len(ids)} tokens; {self.max_length} fit {self.limit}, "
            f"and a turn is never cut: shorten it, or set {setting} to skip"
        )


def _marked(tokenizer: Any, messages: Messages) -> tuple[list[int], Spans]:
    encoded = _templated(
        tokenizer,
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), list(runs(encoded["assistant_masks"]))


def _written(tokenizer: Any, messages: Messages, *, ask: bool = False) -> str:
    text: str = _templated(tokenizer, messages, tokenize=False, add_generation_prompt=ask)
    return text


def _templated(tokenizer: Any, messages: Messages, **how: Any) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(turn) for turn in messages], **how)
    except Exception as error:  # Jinja's, or what the template itself raises
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the chat template refuses this dialogue: {reason}") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
