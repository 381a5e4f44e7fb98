"""Tokenizes texts by segments between special tokens, each distinct segment once.

The texts of a dialogue repeat each other: the text before each answer begins with the text before
the previous one. A tokenizer splits a text at its special tokens first, so the ids of a text are
those of its segments, and only new segments are tokenized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

#: Maximum number of characters of the segments whose ids are kept.
_KEPT_CHARACTERS = 1_000_000

Encode = Callable[[Sequence[str]], list[list[int]]]


class SegmentEncoder:
    """Encodes texts without adding special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        encode: tokenizes complete texts.
    """

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._encode = encode
        self._boundary = _boundary(tokenizer, encode)
        self._ids: dict[str, list[int]] = {}
        self._characters = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        split = [self._segments(text) for text in texts]
        new = [s for s in dict.fromkeys(s for text in split for s in text) if s not in self._ids]
        if new:
            self._characters += sum(map(len, new))
            self._ids |= zip(new, self._encode(new), strict=True)
        encoded = [[token for s in text for token in self._ids[s]] for text in split]
        if self._characters > _KEPT_CHARACTERS:
            self._ids, self._characters = {}, 0
        return encoded

    def _segments(self, text: str) -> list[str]:
        return [text] if self._boundary is None else _split(text, self._boundary)


def _split(text: str, boundary: re.Pattern[str]) -> list[str]:
    """Split a text before every special token."""
    starts = [0, *(match.start() for match in boundary.finditer(text) if match.start())]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _boundary(tokenizer: Any, encode: Encode) -> re.Pattern[str] | None:
    """Return a pattern of the tokens before which texts are split; None: texts stay whole.

    Texts stay whole if a token includes the white space before it or is recognized as a whole word
    only, or if the ids of a probe are not those of its segments.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = [token for token in added if not token.normalized]
    if not tokens or any(token.lstrip or token.single_word for token in tokens):
        return None
    names = sorted((token.content for token in tokens), key=len, reverse=True)
    boundary = re.compile("|".join(map(re.escape, names)))
    probe = "a b" + "".join(f"{name}\na \n{name} b.\n\n{name}a {name}" for name in names)
    complete, *segments = encode([probe, *_split(probe, boundary)])
    return boundary if complete == [token for ids in segments for token in ids] else None
