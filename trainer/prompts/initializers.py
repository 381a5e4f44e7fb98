"""Where virtual tokens start: named functions over the frozen word embeddings, or over the keys and
values that the base makes of words.

Every function returns fp32 virtual tokens on the CPU and draws from the generator it is given,
never from the global one: the same prompt settings give the same start on every rank and in every
bank. Text, vocabulary and random starts are compared in Lester et al. 2021, arXiv 2104.08691.

Shape letters: P virtual tokens, H hidden size, n looked-up words. Keys and values: [P, layers, 2,
heads of keys, head size].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.config import Init
from trainer.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Word embeddings read to estimate their root mean square.
RMS_SAMPLE = 1024


@dataclass(frozen=True)
class Vocabulary:
    """The words of a base and their frozen embeddings.

    Attributes:
        lookup: token ids to word embeddings [n, H]; on a sharded base a collective that every rank
            calls with the same ids.
        tokenizer: gives ids, and says which of them are special.
        size: rows of the base's embedding; may exceed the tokenizer's vocabulary (padding).
        past: token ids, read as one text, to keys and values [n, ...]; a collective, too.
    """

    lookup: Callable[[Sequence[int]], Tensor]
    tokenizer: PreTrainedTokenizerBase
    size: int
    past: Callable[[Sequence[int]], Tensor] | None = None

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Word embeddings [n, H], fp32 on the CPU, no graph.

        Raises:
            BadInput: if the tokenizer gives an id that the base does not have.
        """
        self._check(token_ids)
        with torch.no_grad():
            return self.lookup(list(token_ids)).detach().to("cpu", torch.float32).clone()

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """Keys and values that the base makes of a text, fp32 on the CPU, no graph.

        Raises:
            BadInput: if the tokenizer gives an id that the base does not have.
        """
        self._check(token_ids)
        assert self.past is not None, "prefix tuning needs a base that reads"
        with torch.no_grad():
            return self.past(list(token_ids)).detach().to("cpu", torch.float32).clone()

    def _check(self, token_ids: Sequence[int]) -> None:
        if max(token_ids) >= self.size:
            raise BadInput(
                f"prompts.init: the tokenizer gives id {max(token_ids)}, but the base has only "
                f"{self.size} word embeddings; use the tokenizer that belongs to base.model"
            )

    @cached_property
    def words_n(self) -> Tensor:
        """Ids that the base was trained to read: no special tokens, no padding rows."""
        special = set(self.tokenizer.all_special_ids)
        size = min(self.size, len(self.tokenizer))
        return torch.tensor([i for i in range(size) if i not in special], dtype=torch.long)


def text(source: str, vocabulary: Vocabulary, num_virtual_tokens: int) -> Tensor:
    """Embeddings of a text's tokens, repeated and then cut to P.

    Returns:
        fp32 [P, H].

    Raises:
        BadInput: if the text has no tokens.
    """
    return vocabulary.embed(_text_ids(source, vocabulary, num_virtual_tokens))


def _text_ids(source: str, vocabulary: Vocabulary, num_virtual_tokens: int) -> list[int]:
    """A text's tokens, repeated and then cut to P: PEFT's rule for lengths.

    Unlike PEFT no special tokens are added: the rows bring their own.
    """
    token_ids = list(vocabulary.tokenizer(source, add_special_tokens=False)["input_ids"])
    if not token_ids:
        raise BadInput(f"prompts.init.text: {source!r} has no tokens; write some words")
    if len(token_ids) > num_virtual_tokens:
        logger.warning(
            "init text %r has %d tokens; the first %d become virtual tokens",
            source,
            len(token_ids),
            num_virtual_tokens,
        )
    repeats = -(-num_virtual_tokens // len(token_ids))
    return (token_ids * repeats)[:num_virtual_tokens]


def vocab(vocabulary: Vocabulary, num_virtual_tokens: int, generator: torch.Generator) -> Tensor:
    """Embeddings of words drawn without replacement; drawn again only when all are used up.

    Returns:
        fp32 [P, H].
    """
    return vocabulary.embed(_draw(vocabulary, num_virtual_tokens, generator))


def random(vocabulary: Vocabulary, num_virtual_tokens: int, generator: torch.Generator) -> Tensor:
    """Normal noise with the root mean square of the word embeddings.

    PEFT draws from N(0, 1) whatever the base's scale; word embeddings are usually far smaller, and
    a prompt so loud starts far from anything that the base has read.

    Returns:
        fp32 [P, H].
    """
    count = min(RMS_SAMPLE, len(vocabulary.words_n))
    sample_nH = vocabulary.embed(_draw(vocabulary, count, generator))
    rms = sample_nH.square().mean().sqrt()
    return torch.randn(num_virtual_tokens, sample_nH.shape[1], generator=generator) * rms


def keys_and_values(
    init: Init, vocabulary: Vocabulary, num_virtual_tokens: int, generator: torch.Generator
) -> Tensor:
    """The start of a prompt of prefix tuning: fp32 [P, layers, 2, heads of keys, head size].

    Text and drawn words are read by the base, as one text of P tokens, and leave their keys and
    values. Noise has the root mean square of the keys, and of the values, that the base makes of
    drawn words in that layer; of the middle one of these words, because many bases give their first
    token keys of quite another size.
    """
    if init.text is not None:
        return vocabulary.read(_text_ids(init.text, vocabulary, num_virtual_tokens))
    read = vocabulary.read(_draw(vocabulary, num_virtual_tokens, generator))
    if init.vocab:
        return read
    if init.zero:
        return torch.zeros_like(read)
    assert init.random, f"config allows an initialiser that nobody wrote: {init}"
    rms = read.square().mean(dim=(3, 4), keepdim=True).sqrt().median(dim=0, keepdim=True).values
    return torch.randn(read.shape, generator=generator) * rms


def initialize(
    init: Init, vocabulary: Vocabulary, num_virtual_tokens: int, generator: torch.Generator
) -> Tensor:
    """The start that the run file asks for: fp32 [P, H]."""
    if init.text is not None:
        return text(init.text, vocabulary, num_virtual_tokens)
    if init.vocab:
        return vocab(vocabulary, num_virtual_tokens, generator)
    assert init.random, f"config allows an initialiser that nobody wrote: {init}"
    return random(vocabulary, num_virtual_tokens, generator)


def _draw(vocabulary: Vocabulary, count: int, generator: torch.Generator) -> list[int]:
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
