"""Answers as OpenAI's API writes them: complete, or as events of a stream."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from trainer.commands.serve.token_texts import TokenTexts
from trainer.evaluation.token_sampling import ScoredToken
from trainer.inference.stream_text import INCOMPLETE, Piece

#: In place of minus infinity, which JSON does not have.
LOWEST_LOGPROB = -9999.0


class Answers(ABC):
    """Writes the choices of one request.

    Args:
        num_input_tokens: of all texts, without virtual tokens.
        scored: report log-probabilities.
    """

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(
        self,
        model: str,
        token_texts: TokenTexts,
        end_ids: frozenset[int],
        num_input_tokens: int,
        choices: int,
        *,
        scored: bool,
    ) -> None:
        self._token_texts, self._end_ids, self._scored = token_texts, end_ids, scored
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._num_input_tokens = num_input_tokens
        self._texts = [""] * choices
        self._tokens: list[list[ScoredToken]] = [[] for _ in range(choices)]
        self._finish: list[str | None] = [None] * choices
        self._lengths = [_Length(token_texts.drops_first_space) for _ in range(choices)]

    def add(self, number: int, piece: Piece) -> None:
        """Add a piece of a choice."""
        self._texts[number] += piece.text
        self._tokens[number] += piece.tokens
        self._finish[number] = piece.finish

    def complete(self) -> dict[str, Any]:
        """Return the complete answer."""
        choices = []
        for i, (text, tokens) in enumerate(zip(self._texts, self._tokens, strict=True)):
            logprobs = self._logprobs(i, tokens) if self._scored else None
            written = self.choice(text)
            ends = {"logprobs": logprobs, "finish_reason": self._finish[i]}
            choices.append({"index": i, **written, **ends})
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return the event of a piece, which is added to the choice."""
        is_first = not self._tokens[number]
        self.add(number, piece)
        logprobs = self._logprobs(number, piece.tokens) if self._scored else None
        written = self.partial_choice(piece.text, is_first=is_first)
        choice = {"index": number, **written, "logprobs": logprobs, "finish_reason": piece.finish}
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last event with ``include_usage``."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        generated = sum(map(len, self._tokens))
        return {
            "prompt_tokens": self._num_input_tokens,
            "completion_tokens": generated,
            "total_tokens": self._num_input_tokens + generated,
        }

    @abstractmethod
    def choice(self, text: str) -> dict[str, Any]:
        """Return the fields of a complete choice."""

    @abstractmethod
    def partial_choice(self, text: str, *, is_first: bool) -> dict[str, Any]:
        """Return the fields of a piece of a choice."""

    @abstractmethod
    def scores(self, tokens: Sequence[ScoredToken], offsets: Sequence[int]) -> dict[str, Any]:
        """Return the log-probabilities of tokens; their texts begin at ``offsets``."""

    def _logprobs(self, number: int, tokens: Iterable[ScoredToken]) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens of a choice."""
        listed = [token for token in tokens if token.token_id not in self._end_ids]
        data = [self._token_texts.data(token.token_id) for token in listed]
        return self.scores(listed, [self._lengths[number].add(part) for part in data])


class CompletionAnswers(Answers):
    """Answers of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def partial_choice(self, text: str, *, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def scores(self, tokens: Sequence[ScoredToken], offsets: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._word(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._word(token_id): _finite(value) for token_id, value in token.top}
                for token in tokens
            ],
            "text_offset": list(offsets),
        }

    def _word(self, token_id: int) -> str:
        """Return the text of a token, or the bytes of an incomplete character as OpenAI does."""
        text = self._token_texts.text(token_id)
        if INCOMPLETE not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._token_texts.data(token_id))


class ChatAnswers(Answers):
    """Answers of ``/v1/chat/completions``."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def partial_choice(self, text: str, *, is_first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, "content": text}}

    def scores(self, tokens: Sequence[ScoredToken], offsets: Sequence[int]) -> dict[str, Any]:
        def entry(token_id: int, value: float | None) -> dict[str, Any]:
            data = list(self._token_texts.data(token_id))
            text = self._token_texts.text(token_id)
            return {"token": text, "logprob": _finite(value), "bytes": data}

        content = [
            entry(token.token_id, token.logprob)
            | {"top_logprobs": [entry(token_id, value) for token_id, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class _Length:
    """Number of characters of a text that grows by bytes in UTF-8."""

    def __init__(self, drops_first_space: bool) -> None:
        self._length, self._drops_space = 0, drops_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, data: bytes) -> int:
        """Add bytes, and return the number of complete characters before them."""
        before = self._length
        text = self._decoder.decode(data)
        self._length += len(text.removeprefix(" ") if self._drops_space else text)
        self._drops_space = False
        return before


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else LOWEST_LOGPROB
