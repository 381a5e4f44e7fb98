"""Text -> token ids, equal to those in generation. Needs a tokenizer, but no torch.

A target is tokenized as the continuation of its input: the tokens of ``input + target`` after those
of the input. Tokenized alone, it would begin like a separate text: SentencePiece tokenizers put
``▁`` before every text. If the tokenizer merges the end of the input with the beginning of the
target, ``input + target`` has tokens that do not occur in generation. Then the input keeps its own
tokens, and the target is tokenized as the continuation of another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

from trainer.data.tokenization.segments import SegmentEncoder

#: Texts before a target that merges with its own input; the first one without a merge is used.
_CONTEXTS = ("\n", ".", "(", "a", "0")


class TextTokenizer:
    """Encodes inputs and targets, with the special tokens at the beginning of a text.

    Some tokenizers also end every text with EOS or a separator. They are removed, because between
    input and target they would end the document. A text that begins with the special tokens that
    the tokenizer adds (``<s>`` written in a template) has them once.

    Attributes:
        front: special tokens at the beginning of every text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unknown = [getattr(tokenizer, "unk_token_id", None)]
        bare = self._encode(["a"], special=False)[0]
        full = self._encode(["a"], special=True)[0]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        self.front = full[:start] if start else []
        self._back = full[start + len(bare) :] if start is not None else []

    def inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts, with special tokens at the beginning."""
        encoded = self._encode(texts, special=True)
        if self.front:
            size, twice = len(self.front), self.front * 2
            encoded = [ids[size:] if ids[: 2 * size] == twice else ids for ids in encoded]
        if not self._back:
            return encoded
        cut = len(self._back)
        return [ids[:-cut] if ids[-cut:] == self._back else ids for ids in encoded]

    def targets(
        self, texts: Sequence[str], inputs: Sequence[list[int]], targets: Sequence[str]
    ) -> tuple[list[list[int]], list[bool]]:
        """Tokenize every target as the continuation of its input.

        Args:
            texts: the inputs.
            inputs: their token ids, from the method ``inputs``.

        Returns:
            The ids of the targets; whether input and target merge: ``input + target`` as one text
            has other tokens.
        """
        joined = self.inputs([text + target for text, target in zip(texts, targets, strict=True)])
        continued = [ids[len(own) :] for ids, own in zip(joined, inputs, strict=True)]
        merged = [ids[: len(own)] != own for ids, own in zip(joined, inputs, strict=True)]
        # An unknown word at the end of the input may include the beginning of the target.
        unsure = [i for i, own in enumerate(inputs) if merged[i] or own[-1:] == self._unknown]
        alone = self._continuations([targets[i] for i in unsure])
        for i, ids in zip(unsure, alone, strict=True):
            merged[i] = merged[i] or continued[i] != ids
            continued[i] = ids
        return continued, merged

    def starts(self, text: str) -> list[int]:
        """Return the characters at which tokens begin; without a fast tokenizer, all characters."""
        if not self._tokenizer.is_fast:
            return list(range(len(text)))
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return sorted({start for start, _ in encoded["offset_mapping"]})

    def merges(self, text: str, following: str) -> bool:
        """Whether the tokenizer merges the end of ``text`` with the beginning of ``following``."""
        return self.targets([text], self.inputs([text]), [following])[1][0]

    def beginnings(self) -> dict[int, tuple[int, ...]]:
        """Map each token that begins a text to the tokens of the same text as a continuation.

        Empty for most tokenizers. Others put a space before every text: ``▁Hello`` at the beginning
        is ``Hello`` or ``H``, ``ello`` in a continuation.
        """
        if self._encode(["a"], special=False) == self._continuations(["a"]):
            return {}
        tokens = [token for token in self._tokenizer.get_vocab() if token[0] in "▁Ġ"]
        texts = [self._tokenizer.convert_tokens_to_string([t]).removeprefix(" ") for t in tokens]
        ids = self._tokenizer.convert_tokens_to_ids(tokens)
        return dict(zip(ids, map(tuple, self._continuations(texts)), strict=True))

    def pieces(self, texts: Sequence[str]) -> tuple[list[list[int]], bool]:
        """Tokenize consecutive pieces of one text, without adding special tokens.

        Returns:
            The ids of each piece as the continuation of the previous ones; whether any piece merges
            with the previous one.
        """
        ids, pieces, merged = list[int](), list[list[int]](), False
        encoded = self._segments(list(accumulate(texts)))
        for joined, text in zip(encoded, texts, strict=True):
            if not text:
                pieces.append([])
                continue
            piece = joined[len(ids) :]
            if merged or joined[: len(ids)] != ids or ids[-1:] == self._unknown:
                alone = self._continuations([text])[0]
                merged = merged or joined != ids + alone
                piece = alone
            pieces.append(piece)
            ids += piece
        return pieces, merged

    def pieces_after(self, context: str, texts: Sequence[str]) -> tuple[list[list[int]], bool]:
        """As ``pieces``, for the part of a text that is separated from ``context`` before it."""
        first = next(filter(None, texts), "")
        for before in (context, *_CONTEXTS):
            own, joined = self._segments([before, before + first])
            if own and own[-1:] != self._unknown and joined[: len(own)] == own:
                (_, *pieces), merged = self.pieces([before, *texts])
                return pieces, merged
        return self.pieces(texts)

    @cached_property
    def _segments(self) -> SegmentEncoder:
        return SegmentEncoder(self._tokenizer, partial(self._encode, special=False))

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts as the continuation of a text with which they do not merge."""
        by_text: dict[str, list[int]] = {}
        for context in _CONTEXTS:
            left = [text for text in dict.fromkeys(texts) if text not in by_text]
            own = self._encode([context], special=False)[0] if left else []
            # Skip contexts that the tokenizer drops (white space), and those with unknown words.
            if not own or self._unknown[0] in own:
                continue
            joined = self._encode([context + text for text in left], special=False)
            for text, ids in zip(left, joined, strict=True):
                if ids[: len(own)] == own and len(ids) > len(own):
                    by_text[text] = ids[len(own) :]
        left = [text for text in dict.fromkeys(texts) if text not in by_text]
        by_text |= zip(left, self._encode(left, special=False), strict=True)
        return [by_text[text] for text in texts]

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []

        def encode(some: Sequence[str]) -> list[list[int]]:
            encoded = self._tokenizer(
                list(some),
                add_special_tokens=special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                verbose=False,  # no warning about long texts: row tokenizers report them
            )
            return [list(ids) for ids in encoded["input_ids"]]

        if not _is_plain(self._tokenizer):
            return encode(texts)
        # transformers configures the backend if other settings were used in between. The backend
        # is called without computing offsets into the text, which saves a third of the time.
        backend = self._tokenizer.backend_tokenizer
        first = [] if _is_configured(self._tokenizer) else encode(texts[:1])
        others = backend.encode_batch_fast(list(texts[len(first) :]), add_special_tokens=special)
        return first + [encoding.ids for encoding in others]


def _is_configured(tokenizer: Any) -> bool:
    """Whether the backend of a tokenizer neither pads nor truncates, and splits as set."""
    backend = tokenizer.backend_tokenizer
    split_special = getattr(tokenizer, "split_special_tokens", False)
    return (
        backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == split_special
    )


def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer returns the ids of its backend unchanged, as most classes do."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(type(tokenizer), name) is getattr(TokenizersBackend, name)
        for name in ("__call__", "_encode_plus")
    )
