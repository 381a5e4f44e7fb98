"""Text and bytes of single tokens, as log-probabilities name them."""

from __future__ import annotations

import re
from functools import cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trainer.inference.stream_text import INCOMPLETE

#: Byte tokens of SentencePiece.
_BYTE = re.compile("<0x([0-9A-F]{2})>")
#: Characters that stand for bytes in the tokens of byte-level BPE.
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenTexts:
    """Decodes single tokens as if other text preceded them, so that they keep their space.

    Attributes:
        text: returns the text of a token, with U+FFFD in place of an incomplete character.
        data: returns the bytes of a token in UTF-8, also those of an incomplete character.
        drops_first_space: whether decoding removes the space at the beginning of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before: int = tokenizer.encode("a", add_special_tokens=False)[-1]
        self.text, self.data = cache(self._text), cache(self._data)
        after_space = tokenizer.encode("a b", add_special_tokens=False)[1]
        self.drops_first_space = not self._decode(after_space).startswith(" ")

    def _text(self, token_id: int) -> str:
        return self._decode(self._before, token_id).removeprefix(self._decode(self._before))

    def _data(self, token_id: int) -> bytes:
        text = self.text(token_id)
        token = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if INCOMPLETE not in text:
            return text.encode()
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if set(token) <= _BYTE_OF.keys():
            return bytes(_BYTE_OF[character] for character in token)
        return text.encode()

    def _decode(self, *ids: int) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
