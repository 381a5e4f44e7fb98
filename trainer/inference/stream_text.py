"""Decode a growing list of tokens to pieces of its final text."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.stop_criteria import StopCriteria

#: What a decoder writes for the bytes of an incomplete character.
INCOMPLETE = "\ufffd"


class TextPieces:
    """Text of one request, in pieces whose concatenation is exactly ``StopCriteria.text``.

    Held back until more tokens are there: incomplete characters, and ends of the text that can be
    the beginning of a stop string.
    """

    def __init__(self, stop: StopCriteria, skip_special_tokens: bool) -> None:
        self._stop, self._skip = stop, skip_special_tokens
        # Tokenizers that remove spaces before punctuation can still remove the last space.
        self._cleans = bool(getattr(stop.tokenizer, "clean_up_tokenization_spaces", False))
        self._written = ""

    def next(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """Return the text that is new since the last call.

        Args:
            ids: all tokens so far.
            is_last: no tokens follow, so nothing is held back.
        """
        text = self._stop.text(ids, skip_special_tokens=self._skip)
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
