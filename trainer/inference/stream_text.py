"""Decode a growing list of tokens to pieces of its final text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.evaluation.stop_criteria import StopCriteria, before_stop
from trainer.evaluation.token_sampling import ScoredToken

#: ``stop``: an end token or a stop string; ``length``: the limit of tokens; ``cancelled``: by the
#: caller, or because the decoder was closed; ``failed``: decoding raised an error.
FinishReason = Literal["stop", "length", "cancelled", "failed"]

#: What a decoder writes for the bytes of an incomplete character.
INCOMPLETE = "\ufffd"
#: Tokens at the end of a text that are decoded again with each new one: at least as many.
WINDOW = 32


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
    """Text of one request, in pieces whose concatenation is the final text.

    That is ``StopCriteria.text`` without special tokens. Only the last tokens are decoded for each
    piece, so that its cost does not depend on the length of the text.

    Incomplete characters, and ends of the text that can begin a stop string, are delayed until more
    tokens follow. Only a character of byte tokens of SentencePiece can change afterwards: an
    invalid byte behind it makes all of them ``INCOMPLETE``. The piece with the character stays.
    """

    def __init__(self, stop: StopCriteria) -> None:
        self._stop = stop
        # Tokenizers that remove spaces before punctuation can still remove the last space.
        self._cleans = bool(getattr(stop.tokenizer, "clean_up_tokenization_spaces", False))
        self._written = ""
        #: Number of tokens that are not decoded again, and their text.
        self._num_decoded, self._decoded = 0, ""

    def next(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """Return the text that is new since the last call.

        Args:
            ids: all tokens so far; only the last one can be an end token.
            is_last: no tokens follow, so nothing is delayed.
        """
        has_end = bool(ids) and ids[-1] in self._stop.token_ids
        text = before_stop(self._text(ids[:-1] if has_end else ids), self._stop.strings)
        if not is_last:
            text = text[: self._settled(text)]
        new = text[len(self._written) :]
        if new:
            self._written = text
        return new

    def _text(self, ids: Sequence[int]) -> str:
        """Decode all tokens, of which most have been decoded before."""
        text = self._decode(ids[self._num_decoded :])
        if len(ids) - self._num_decoded > 2 * WINDOW:
            last = self._decode(ids[-WINDOW:])
            # Not if the tokens before change them, as within a character.
            if last and text.endswith(last):
                self._num_decoded = len(ids) - WINDOW
                self._decoded += text.removesuffix(last)
                text = last
        return self._decoded + text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._stop.tokenizer.decode(list(ids), skip_special_tokens=True))

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
