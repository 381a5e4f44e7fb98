"""Decode a growing list of tokens to pieces of its final text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.evaluation.stop_criteria import StopCriteria
from trainer.evaluation.token_sampling import ScoredToken

#: ``stop``: an end token or a stop string; ``length``: the limit of tokens; ``cancelled``: by the
#: caller, or because the decoder was closed; ``failed``: decoding raised an error.
FinishReason = Literal["stop", "length", "cancelled", "failed"]

#: What a decoder writes for the bytes of an incomplete character.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """Text since the last piece. All texts of a request, one after the other, are its final text.

    Attributes:
        tokens: generated tokens since the last piece. Their text can be in a later piece:
            incomplete characters and beginnings of stop strings are delayed.
        finish: set in the last piece of a request.
    """

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    finish: FinishReason | None = None


class TextPieces:
    """Text of one request, in pieces whose concatenation is exactly the final text.

    That is ``StopCriteria.text`` without special tokens.

    Incomplete characters, and ends of the text that can begin a stop string, are delayed until more
    tokens follow.
    """

    def __init__(self, stop: StopCriteria) -> None:
        self._stop = stop
        # Tokenizers that remove spaces before punctuation can still remove the last space.
        self._cleans = bool(getattr(stop.tokenizer, "clean_up_tokenization_spaces", False))
        self._written = ""

    def next(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """Return the text that is new since the last call.

        Args:
            ids: all tokens so far.
            is_last: no tokens follow, so nothing is delayed.
        """
        text = self._stop.text(ids, skip_special_tokens=True)
        if not is_last:
            text = text[: self._settled(text)]
        if not text.startswith(self._written):
            return ""
        new, self._written = text[len(self._written) :], text
        return new

    def _settled(self, text: str) -> int:
        """Return the number of characters that further tokens cannot change."""
        end = len(text.rstrip(INCOMPLETE))
        if self._cleans:
            end = min(end, text.rfind(" ") if " " in text else end)
        return end - max((_overlap(text[:end], stop) for stop in self._stop.strings), default=0)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
