"""Where virtual tokens start: named functions over the frozen word embeddings, or over the keys and
values that the base makes of words.

Every function returns fp32 virtual tokens on the CPU and draws from the generator it is given,
never from the global one: the same prompt settings give the same start on every rank and in every
bank. Label, vocabulary and random starts are compared in Lester et al. 2021, arXiv 2104.08691.

One rule for lengths, PEFT's: what is shorter than P is repeated, what is longer is cut; a warning
says how much was used.

Shape letters: P virtual tokens, H hidden size, n looked-up words. Keys and values: [P, layers, 2,
heads of keys, head size].
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
from trainer.prompts.saved_prompts import find_source
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Word embeddings read to estimate their root mean square.
RMS_SAMPLE = 1024
#: Words that are drawn from: the most frequent (Lester et al. 2021, section 3.2, take as many).
FREQUENT = 5000


@dataclass(frozen=True)
class Vocabulary:
    """The words of a base and their frozen embeddings.

    Attributes:
        lookup: token ids to word embeddings [n, H]; on a sharded base a collective that every rank
            calls with the same ids.
        tokenizer: gives ids, and says which of them are special.
        size: rows of the base's embedding; may exceed the tokenizer's vocabulary (padding).
        past: token ids, read as one text, to keys and values [n, ...]; a collective, too.
        warn: takes a line for people.
    """

    lookup: Callable[[Sequence[int]], Tensor]
    tokenizer: PreTrainedTokenizerBase
    size: int
    past: Callable[[Sequence[int]], Tensor] | None = None
    warn: Callable[[str], None] = logger.warning

    def ids(self, source: str) -> list[int]:
        """A text's tokens. Unlike PEFT no special tokens are added: the rows bring their own."""
        return list(self.tokenizer(source, add_special_tokens=False)["input_ids"])

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
        """Ids of frequent words: no special or added tokens, no padding rows, no bare bytes.

        A tokenizer numbers its tokens in the order in which they were merged (BPE), or by their
        probability (unigram): the frequent ones come first.
        """
        unlike = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        ordinary = (i for i in range(min(self.size, len(self.tokenizer))) if i not in unlike)
        words = islice((i for i in ordinary if _is_text(self.tokenizer.decode([i]))), FREQUENT)
        return torch.tensor(list(words), dtype=torch.long)


def _is_text(decoded: str | list[str]) -> bool:
    """Whether a token is more than space or a part of a character."""
    return bool(str(decoded).strip()) and "\ufffd" not in decoded


def words(source: str, vocabulary: Vocabulary) -> Tensor:
    """Embeddings of a text's tokens as they are, fp32 [n, H].

    Raises:
        BadInput: if the text has no tokens.
    """
    return vocabulary.embed(_all_text_ids(source, vocabulary))


def _all_text_ids(source: str, vocabulary: Vocabulary) -> list[int]:
    token_ids = vocabulary.ids(source)
    if not token_ids:
        raise BadInput(f"prompts.init.text: {source!r} has no tokens; write some words")
    return token_ids


def _text_ids(source: str, vocabulary: Vocabulary, num_virtual_tokens: int) -> list[int]:
    token_ids = _all_text_ids(source, vocabulary)
    what = f"init text {source!r} has {len(token_ids)} tokens"
    return [token_ids[i] for i in _used(len(token_ids), num_virtual_tokens, vocabulary, what)]


def _label_ids(labels: Sequence[str], vocabulary: Vocabulary, num_virtual_tokens: int) -> list[int]:
    """First tokens of all labels, then their second ones and so on, repeated and then cut to P.

    In this order every label takes part before one takes part twice.
    """
    columns = zip_longest(*(vocabulary.ids(label) for label in labels))
    token_ids = [i for column in columns for i in column if i is not None]
    if not token_ids:
        raise BadInput(f"prompts.init.labels: {list(labels)} have no tokens; use init: vocab")
    shown = ", ".join(label.strip() for label in labels)
    what = f"init labels ({shown}) have {len(token_ids)} tokens"
    return [token_ids[i] for i in _used(len(token_ids), num_virtual_tokens, vocabulary, what)]


def _used(count: int, num_virtual_tokens: int, vocabulary: Vocabulary, what: str) -> list[int]:
    """Which of ``count`` tokens P virtual ones start from: repeated, as in PEFT, or cut."""
    if count > num_virtual_tokens:
        vocabulary.warn(f"{what}; the first {num_virtual_tokens} become virtual tokens")
    return [i % count for i in range(num_virtual_tokens)]


def trained(path: str, vocabulary: Vocabulary, num_virtual_tokens: int) -> Tensor:
    """A trained prompt, repeated and then cut to P (SPoT: Vu et al. 2021, arXiv 2110.07904).

    Returns:
        fp32 [P, H], or keys and values [P, layers, 2, heads of keys, head size].

    Raises:
        BadInput: if there is none, or one that is not finite.
    """
    source = find_source(path)
    prompt = load_peft(source.folder).tensor.float()
    if not prompt.isfinite().all():
        raise BadInput(f"prompts.init.from: {source.folder} is not finite; name another prompt")
    what = f"init from {path} has {len(prompt)} virtual tokens"
    if len(prompt) < num_virtual_tokens:
        vocabulary.warn(f"{what}; repeated, they start {num_virtual_tokens}")
    return prompt[_used(len(prompt), num_virtual_tokens, vocabulary, what)]


def draw(vocabulary: Vocabulary, count: int, generator: torch.Generator) -> list[int]:
    """Tokens of words drawn without replacement; drawn again only when all are used up."""
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


def random(vocabulary: Vocabulary, num_virtual_tokens: int, generator: torch.Generator) -> Tensor:
    """Normal noise with the root mean square of the word embeddings.

    PEFT draws from N(0, 1) whatever the base's scale; word embeddings are usually far smaller, and
    a prompt so loud starts far from anything that the base has read.

    Returns:
        fp32 [P, H].
    """
    count = min(RMS_SAMPLE, len(vocabulary.words_n))
    sample_nH = vocabulary.embed(draw(vocabulary, count, generator))
    rms = sample_nH.square().mean().sqrt()
    return torch.randn(num_virtual_tokens, sample_nH.shape[1], generator=generator) * rms


def word_ids(
    init: Init,
    vocabulary: Vocabulary,
    num_virtual_tokens: int,
    generator: torch.Generator,
    labels: Sequence[str] = (),
) -> list[int] | None:
    """The P tokens of a start that is words: a text, labels or drawn ones; None: it is none.

    Args:
        labels: the task's choices as its rows have them.

    Raises:
        BadInput: if there is nothing to start from.
    """
    if init.text is not None:
        return _text_ids(init.text, vocabulary, num_virtual_tokens)
    if init.labels:
        return _label_ids(labels, vocabulary, num_virtual_tokens)
    if init.vocab:
        return draw(vocabulary, num_virtual_tokens, generator)
    return None


def keys_and_values(
    init: Init,
    vocabulary: Vocabulary,
    num_virtual_tokens: int,
    generator: torch.Generator,
    labels: Sequence[str] = (),
) -> Tensor:
    """The start of a prompt of prefix tuning: fp32 [P, layers, 2, heads of keys, head size].

    Text, labels and drawn words are read by the base, as one text of P tokens, and leave their keys
    and values. Noise has the root mean square of the keys, and of the values, that the base makes
    of drawn words in that layer; of the middle one of these words, because many bases give their
    first token keys of quite another size.

    Raises:
        BadInput: as ``initialize``.
    """
    ids = word_ids(init, vocabulary, num_virtual_tokens, generator, labels)
    if ids is not None:
        return vocabulary.read(ids)
    read = vocabulary.read(draw(vocabulary, num_virtual_tokens, generator))
    if init.zero:
        return torch.zeros_like(read)
    if init.from_ is not None:
        return _of_this_base(trained(init.from_, vocabulary, num_virtual_tokens), read, init.from_)
    assert init.random, f"config allows an initialiser that nobody wrote: {init}"
    rms = read.square().mean(dim=(3, 4), keepdim=True).sqrt().median(dim=0, keepdim=True).values
    return torch.randn(read.shape, generator=generator) * rms


def initialize(
    init: Init,
    vocabulary: Vocabulary,
    num_virtual_tokens: int,
    generator: torch.Generator,
    labels: Sequence[str] = (),
) -> Tensor:
    """The start that the run file asks for: fp32 [P, H].

    Raises:
        BadInput: if there is nothing to start from, or a trained prompt is of another base.
    """
    ids = word_ids(init, vocabulary, num_virtual_tokens, generator, labels)
    if ids is not None:
        return vocabulary.embed(ids)
    if init.from_ is not None:
        word_1H = vocabulary.embed([0])
        return _of_this_base(
            trained(init.from_, vocabulary, num_virtual_tokens), word_1H, init.from_
        )
    assert init.random, f"config allows an initialiser that nobody wrote: {init}"
    return random(vocabulary, num_virtual_tokens, generator)


def known_starts(labels: Sequence[str], hand_written: Sequence[str]) -> list[tuple[str, Init]]:
    """What ``init: auto`` knows of a task before it draws words: starts, and what each is."""
    candidates = [(f"the hand-written {text.strip()!r}", Init(text=text)) for text in hand_written]
    if len(hand_written) > 1:
        # A prompt is often longer than one of them: together they fill it without repetition.
        candidates.append(
            ("all hand-written prompts", Init(text=" ".join(map(str.strip, hand_written))))
        )
    if labels:
        candidates.append(("the task's choices", Init(labels=True)))
    return candidates


def _of_this_base(prompt: Tensor, like: Tensor, path: str) -> Tensor:
    """A prompt whose tokens have the shape of those that the base makes."""
    if prompt.shape[1:] != like.shape[1:]:
        raise BadInput(
            f"prompts.init.from: a virtual token of {path} has the shape "
            f"{tuple(prompt.shape[1:])}, but this base needs {tuple(like.shape[1:])}; name a "
            "prompt of this base and method"
        )
    return prompt
