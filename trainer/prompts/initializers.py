"""Initial values of prompts, from token embeddings or from keys and values of the base model.

Values are fp32 on the CPU. Random ones are drawn from the generator argument, never from the global
one, so they are equal on every rank and independent of other prompts. Lester et al. 2021 (arXiv
2104.08691) compare initialization from labels, vocabulary and noise.

As in PEFT, texts shorter than P tokens are repeated; longer ones are cut, with a warning.

Shape letters: P virtual tokens, H hidden size, n tokens. Keys and values: [P, layers, 2, key heads,
head size].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.config import Init
from trainer.prompts.peft_adapter import load_peft
from trainer.prompts.saved_prompts import find_source, trained_rows
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Token embeddings sampled to estimate their root mean square.
RMS_SAMPLE = 1024
#: Number of most frequent tokens to draw from, as in Lester et al. 2021, section 3.2.
FREQUENT = 5000


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of the base model and their frozen embeddings.

    Attributes:
        lookup: token ids -> embeddings [n, H]; on a sharded base a collective that every rank calls
            with the same ids.
        size: rows of the embedding table; may exceed the tokenizer's vocabulary (padding).
        past: token ids of a text -> its keys and values [n, ...]; also a collective.
    """

    lookup: Callable[[Sequence[int]], Tensor]
    tokenizer: PreTrainedTokenizerBase
    size: int
    past: Callable[[Sequence[int]], Tensor] | None = None
    warn: Callable[[str], None] = logger.warning

    def ids(self, source: str) -> list[int]:
        """Tokenize a text without special tokens (PEFT adds them), because rows have their own."""
        return list(self.tokenizer(source, add_special_tokens=False)["input_ids"])

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Look up embeddings [n, H], fp32 on the CPU; raises ``BadInput`` for an unknown id."""
        self._check(token_ids)
        with torch.no_grad():
            return self.lookup(list(token_ids)).detach().to("cpu", torch.float32).clone()

    def read(self, token_ids: Sequence[int], after: Sequence[int] = ()) -> Tensor:
        """Compute the keys and values of a text, which follows the text ``after``; as ``embed``."""
        self._check(token_ids)
        assert self.past is not None, "prefix tuning needs keys and values"
        with torch.no_grad():
            read = self.past([*after, *token_ids])[len(after) :]
        return read.detach().to("cpu", torch.float32).clone()

    def _check(self, token_ids: Sequence[int]) -> None:
        if max(token_ids) >= self.size:
            raise BadInput(
                f"prompts.init: the tokenizer gives id {max(token_ids)}, but the base has only "
                f"{self.size} word embeddings; use the tokenizer that belongs to base.model"
            )

    @cached_property
    def words_n(self) -> Tensor:
        """Ids of the most frequent tokens, without special, added, blank or partial-character ones.

        Tokenizers number tokens in merge order (BPE) or by probability (unigram), so the frequent
        ones come first.
        """
        unlike = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        # Embedding tables may have rows without a token, at the end or in between.
        known = sorted(i for i in self.tokenizer.get_vocab().values() if i < self.size)
        ordinary = (i for i in known if i not in unlike)
        words = islice((i for i in ordinary if _is_text(self.tokenizer.decode([i]))), FREQUENT)
        return torch.tensor(list(words), dtype=torch.long)


def _is_text(decoded: str | list[str]) -> bool:
    return bool(str(decoded).strip()) and "\ufffd" not in decoded


def embed_text(source: str, vocabulary: Vocabulary) -> Tensor:
    """Embed the tokens of a text, fp32 [n, H]; raises ``BadInput`` if it has none."""
    return vocabulary.embed(_all_text_ids(source, vocabulary))


def _all_text_ids(source: str, vocabulary: Vocabulary) -> list[int]:
    token_ids = vocabulary.ids(source)
    if not token_ids:
        raise BadInput(f"prompts.init.text: {source!r} has no tokens; give a text")
    return token_ids


def _text_ids(source: str, vocabulary: Vocabulary, num_virtual_tokens: int) -> list[int]:
    token_ids = _all_text_ids(source, vocabulary)
    what = f"init text {source!r} has {len(token_ids)} tokens"
    return [token_ids[i] for i in _used(len(token_ids), num_virtual_tokens, vocabulary, what)]


def _label_ids(labels: Sequence[str], vocabulary: Vocabulary, num_virtual_tokens: int) -> list[int]:
    """Return the first tokens of all labels, then the second and so on, repeated or cut to P.

    In this order every label is used before any is used twice.
    """
    columns = zip_longest(*(vocabulary.ids(label) for label in labels))
    token_ids = [i for column in columns for i in column if i is not None]
    if not token_ids:
        raise BadInput(f"prompts.init.labels: {list(labels)} have no tokens; use init: vocab")
    shown = ", ".join(label.strip() for label in labels)
    what = f"init labels ({shown}) have {len(token_ids)} tokens"
    return [token_ids[i] for i in _used(len(token_ids), num_virtual_tokens, vocabulary, what)]


def _used(count: int, num_virtual_tokens: int, vocabulary: Vocabulary, what: str) -> list[int]:
    """Return the index, among ``count`` tokens, that initializes each virtual token."""
    if count > num_virtual_tokens:
        vocabulary.warn(f"{what}; the first {num_virtual_tokens} become virtual tokens")
    return [i % count for i in range(num_virtual_tokens)]


def from_adapter(path: str, vocabulary: Vocabulary, num_virtual_tokens: int) -> Tensor:
    """Load a trained prompt, repeated or cut to P (SPoT: Vu et al. 2021, arXiv 2110.07904).

    Returns fp32 [P, H] or keys and values; raises ``BadInput`` if missing or not finite.
    """
    source = find_source(path)
    prompt = load_peft(source.folder).tensor.float()
    if source.prefix:  # without those of fixed text before it
        prompt = prompt[trained_rows(source.folder, len(prompt))]
    if not prompt.isfinite().all():
        raise BadInput(f"prompts.init.from: {source.folder} is not finite; name another prompt")
    what = f"init from {path} has {len(prompt)} virtual tokens"
    if len(prompt) < num_virtual_tokens:
        vocabulary.warn(f"{what}; repeated, they start {num_virtual_tokens}")
    return prompt[_used(len(prompt), num_virtual_tokens, vocabulary, what)]


def draw_tokens(vocabulary: Vocabulary, count: int, generator: torch.Generator) -> list[int]:
    """Draw frequent tokens, each once before any is drawn a second time."""
    words_n = vocabulary.words_n
    if not len(words_n):
        raise BadInput(
            "prompts.init: the tokenizer has no ordinary words; use the base's tokenizer"
        )
    drawn: list[int] = []
    while len(drawn) < count:
        order_n = torch.randperm(len(words_n), generator=generator)
        drawn += words_n[order_n[: count - len(drawn)]].tolist()
    return drawn


def from_noise(
    vocabulary: Vocabulary, num_virtual_tokens: int, generator: torch.Generator
) -> Tensor:
    """Draw normal noise [P, H] with the root mean square of the token embeddings.

    PEFT draws from N(0, 1), which is usually far larger than token embeddings.
    """
    count = min(RMS_SAMPLE, len(vocabulary.words_n))
    sample_nH = vocabulary.embed(draw_tokens(vocabulary, count, generator))
    rms = sample_nH.square().mean().sqrt()
    return torch.randn(num_virtual_tokens, sample_nH.shape[1], generator=generator) * rms


def initial_token_ids(
    init: Init,
    vocabulary: Vocabulary,
    num_virtual_tokens: int,
    generator: torch.Generator,
    labels: Sequence[str] = (),
) -> list[int] | None:
    """Return the P token ids of an initialization from text, labels or vocabulary; else None.

    Args:
        labels: the task's choices as they occur in rows.

    Raises:
        BadInput: the text or the labels have no tokens.
    """
    if init.text is not None:
        return _text_ids(init.text, vocabulary, num_virtual_tokens)
    if init.labels:
        return _label_ids(labels, vocabulary, num_virtual_tokens)
    if init.vocab:
        return draw_tokens(vocabulary, num_virtual_tokens, generator)
    return None


def keys_and_values(
    init: Init,
    vocabulary: Vocabulary,
    num_virtual_tokens: int,
    generator: torch.Generator,
    labels: Sequence[str] = (),
    after: Sequence[int] = (),
) -> Tensor:
    """Compute initial keys and values, fp32 [P, layers, 2, key heads, head size].

    The base model reads text, labels or drawn tokens as one text of P tokens, which follows the
    tokens ``after``. Noise has, in each
    layer, the root mean square of the keys (or values) of drawn tokens: the median over the tokens,
    because in many models the first token has keys of a very different size.

    Raises:
        BadInput: as ``initialize``.
    """
    ids = initial_token_ids(init, vocabulary, num_virtual_tokens, generator, labels)
    if ids is not None:
        return vocabulary.read(ids, after)
    read = vocabulary.read(draw_tokens(vocabulary, num_virtual_tokens, generator), after)
    if init.zero:
        return torch.zeros_like(read)
    if init.from_ is not None:
        return _of_this_base(
            from_adapter(init.from_, vocabulary, num_virtual_tokens), read, init.from_
        )
    assert init.random, f"unknown initializer: {init}"
    rms = read.square().mean(dim=(3, 4), keepdim=True).sqrt().median(dim=0, keepdim=True).values
    return torch.randn(read.shape, generator=generator) * rms


def initialize(
    init: Init,
    vocabulary: Vocabulary,
    num_virtual_tokens: int,
    generator: torch.Generator,
    labels: Sequence[str] = (),
) -> Tensor:
    """Compute initial virtual tokens, fp32 [P, H].

    Raises:
        BadInput: the text or the labels have no tokens, or the trained prompt is of another base.
    """
    ids = initial_token_ids(init, vocabulary, num_virtual_tokens, generator, labels)
    if ids is not None:
        return vocabulary.embed(ids)
    if init.from_ is not None:
        word_1H = vocabulary.embed([0])
        return _of_this_base(
            from_adapter(init.from_, vocabulary, num_virtual_tokens), word_1H, init.from_
        )
    assert init.random, f"unknown initializer: {init}"
    return from_noise(vocabulary, num_virtual_tokens, generator)


def hand_written_starts(texts: Sequence[str]) -> list[tuple[str, Init]]:
    """Return the initial prompts from hand-written texts, each with a description."""
    starts = [(f"the hand-written {text.strip()!r}", Init(text=text)) for text in texts]
    if len(texts) > 1:
        # Joined, they fill a prompt that is longer than each of them, without repetition.
        starts.append(("all hand-written prompts", Init(text=" ".join(map(str.strip, texts)))))
    return starts


def _of_this_base(prompt: Tensor, like: Tensor, path: str) -> Tensor:
    """Check that a prompt has the shape of this base's embeddings, or keys and values."""
    if prompt.shape[1:] != like.shape[1:]:
        raise BadInput(
            f"prompts.init.from: a virtual token of {path} has the shape "
            f"{tuple(prompt.shape[1:])}, but this base needs {tuple(like.shape[1:])}; name a "
            "prompt of this base and method"
        )
    return prompt
