"""Answers as OpenAI's API writes them: complete, or as events of a stream."""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from trainer.evaluation.token_sampling import ScoredToken
from trainer.inference.stream_text import Piece

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
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        num_input_tokens: int,
        choices: int,
        *,
        scored: bool,
    ) -> None:
        self._tokenizer, self._end_ids, self._scored = tokenizer, end_ids, scored
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._num_input_tokens = num_input_tokens
        self._texts = [""] * choices
        self._tokens: list[list[ScoredToken]] = [[] for _ in range(choices)]
        self._finish: list[str | None] = [None] * choices

    def add(self, number: int, piece: Piece) -> None:
        """Add a piece of a choice."""
        self._texts[number] += piece.text
        self._tokens[number] += piece.tokens
        self._finish[number] = piece.finish

    def complete(self) -> dict[str, Any]:
        """Return the complete answer."""
        choices = []
        for i, (text, tokens) in enumerate(zip(self._texts, self._tokens, strict=True)):
            logprobs = self._logprobs(tokens, 0) if self._scored else None
            written = self.choice(text)
            ends = {"logprobs": logprobs, "finish_reason": self._finish[i]}
            choices.append({"index": i, **written, **ends})
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return the event of a piece, which is added to the choice."""
        offset, is_first = len(self._texts[number]), not self._tokens[number]
        self.add(number, piece)
        logprobs = self._logprobs(piece.tokens, offset) if self._scored else None
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
    def scores(self, tokens: Sequence[ScoredToken], offset: int) -> dict[str, Any]:
        """Return the log-probabilities of tokens; the text of the first begins at ``offset``."""

    def _logprobs(self, tokens: Iterable[ScoredToken], offset: int) -> dict[str, Any]:
        return self.scores([t for t in tokens if t.token_id not in self._end_ids], offset)

    def word(self, token_id: int) -> str:
        """Return the text of one token."""
        return str(self._tokenizer.decode([token_id]))


class CompletionAnswers(Answers):
    """Answers of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def partial_choice(self, text: str, *, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def scores(self, tokens: Sequence[ScoredToken], offset: int) -> dict[str, Any]:
        words = [self.word(token.token_id) for token in tokens]
        offsets = [offset + len("".join(words[:i])) for i in range(len(words))]
        return {
            "tokens": words,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self.word(token_id): _finite(value) for token_id, value in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }


class ChatAnswers(Answers):
    """Answers of ``/v1/chat/completions``."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def partial_choice(self, text: str, *, is_first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, "content": text}}

    def scores(self, tokens: Sequence[ScoredToken], offset: int) -> dict[str, Any]:
        def entry(token_id: int, value: float | None) -> dict[str, Any]:
            word = self.word(token_id)
            number = _finite(value)
            return {"token": word, "logprob": number, "bytes": list(word.encode())}

        content = [
            entry(token.token_id, token.logprob)
            | {"top_logprobs": [entry(token_id, value) for token_id, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else LOWEST_LOGPROB
