"""Text -> token ids, as the base model reads it in generation. Needs a tokenizer, but no torch.

A target continues its input: its tokens are those that the text ``input + target`` has after the
tokens of the input. Tokenized alone, it would begin like a text of its own: SentencePiece
tokenizers put ``▁`` in front of every text. Where the tokenizer merges the end of the input with
the beginning of the target, the joined text has tokens that generation never reads: the input keeps
its own tokens there, and the target is tokenized as the continuation of another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

#: Texts that a target is put behind where it merges with its own input; the first that it does not
#: merge with is used.
_CONTEXTS = ("\n", ".", "(", "a", "0")


class TextTokenizer:
    """Encodes inputs and targets, with the special tokens that belong in front of a text.

    Some tokenizers also close every text with EOS or a separator. That is removed: between input
    and target it would end the document before its answer.

    Attributes:
        front: special tokens in front of every text.
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
        """Token ids of every text, special tokens in front."""
        encoded = self._encode(texts, special=True)
        if not self._back:
            return encoded
        cut = len(self._back)
        return [ids[:-cut] if ids[-cut:] == self._back else ids for ids in encoded]

    def targets(
        self, texts: Sequence[str], inputs: Sequence[list[int]], targets: Sequence[str]
    ) -> tuple[list[list[int]], list[bool]]:
        """Token ids of every target as the continuation of its input.

        Args:
            texts: the inputs.
            inputs: their token ids, of ``inputs``.

        Returns:
            the ids of the targets; whether input and target merge, so that ``input + target`` as
            one text has other tokens.
        """
        joined = self.inputs([text + target for text, target in zip(texts, targets, strict=True)])
        found = [ids[len(own) :] for ids, own in zip(joined, inputs, strict=True)]
        merged = [ids[: len(own)] != own for ids, own in zip(joined, inputs, strict=True)]
        # An unknown word at the end of the input may have swallowed the beginning of the target.
        unsure = [i for i, own in enumerate(inputs) if merged[i] or own[-1:] == self._unknown]
        alone = self._continuations([targets[i] for i in unsure])
        for i, ids in zip(unsure, alone, strict=True):
            merged[i] = merged[i] or found[i] != ids
            found[i] = ids
        return found, merged

    def merges(self, text: str, following: str) -> bool:
        """Whether the tokenizer merges the end of a text with the beginning of the following."""
        return self.targets([text], self.inputs([text]), [following])[1][0]

    def beginnings(self) -> dict[int, tuple[int, ...]]:
        """Tokens that begin a text, each as it is where its text continues another one.

        Empty for most tokenizers. Others put a space in front of every text: where ``▁Hello``
        begins one, ``Hello`` or ``H``, ``ello`` continues one.
        """
        if self._encode(["a"], special=False) == self._continuations(["a"]):
            return {}
        tokens = [token for token in self._tokenizer.get_vocab() if token[0] in "▁Ġ"]
        texts = [self._tokenizer.convert_tokens_to_string([t]).removeprefix(" ") for t in tokens]
        ids = self._tokenizer.convert_tokens_to_ids(tokens)
        return dict(zip(ids, map(tuple, self._continuations(texts)), strict=True))

    def pieces(self, texts: Sequence[str]) -> tuple[list[list[int]], bool]:
        """Token ids of the pieces of one text, without special tokens of the encoder's own.

        Returns:
            the ids of each piece as the continuation of those before it; whether any merges with
            what stands before it.
        """
        ids, found, merged = list[int](), list[list[int]](), False
        for until, text in zip(accumulate(texts), texts, strict=True):
            joined = self._encode([until], special=False)[0]
            piece = joined[len(ids) :]
            if merged or joined[: len(ids)] != ids or ids[-1:] == self._unknown:
                alone = self._continuations([text])[0] if text else []
                merged = merged or joined != ids + alone
                piece = alone
            found.append(piece)
            ids += piece
        return found, merged

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts behind a text that they do not merge with."""
        found: dict[str, list[int]] = {}
        for context in _CONTEXTS:
            left = [text for text in dict.fromkeys(texts) if text not in found]
            own = self._encode([context], special=False)[0] if left else []
            # White space that the tokenizer drops, or an unknown word, tells nothing.
            if not own or self._unknown[0] in own:
                continue
            joined = self._encode([context + text for text in left], special=False)
            for text, ids in zip(left, joined, strict=True):
                if ids[: len(own)] == own and len(ids) > len(own):
                    found[text] = ids[len(own) :]
        left = [text for text in dict.fromkeys(texts) if text not in found]
        found |= zip(left, self._encode(left, special=False), strict=True)
        return [found[text] for text in texts]

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
                verbose=False,  # no warning about long texts: the fitters report them
            )
            return [list(ids) for ids in encoded["input_ids"]]

        if not _is_plain(self._tokenizer):
            return encode(texts)
        # What transformers does for the first text sets the backend up; for the others the backend
        # need not find the places of tokens in the text, which takes a third of the time.
        backend = self._tokenizer.backend_tokenizer
        found = encode(texts[:1])
        others = backend.encode_batch_fast(list(texts[1:]), add_special_tokens=special)
        return found + [encoding.ids for encoding in others]


def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer gives the ids of its backend, as most classes of transformers do."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(type(tokenizer), name) is getattr(TokenizersBackend, name)
        for name in ("__call__", "_encode_plus")
    )
