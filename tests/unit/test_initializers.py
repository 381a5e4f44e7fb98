"""Initialisers: lengths, sources, determinism, and what they refuse."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from trainer.config import Init
from trainer.errors import BadInput
from trainer.prompts.initializers import Vocabulary, initialize, random, text, vocab

WORDS = ["[BOS]", "[EOS]", "a", "b", "c", "d", "e", "f"]
SPECIAL = {0, 1}
HIDDEN = 6


def make_tokenizer() -> PreTrainedTokenizerFast:
    model = WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]", add_bos_token=True
    )


# Two rows more than the tokenizer has words: bases pad their embeddings.
TABLE_VH = torch.randn(len(WORDS) + 2, HIDDEN, generator=torch.Generator().manual_seed(7)) * 0.02


@pytest.fixture
def vocabulary() -> Vocabulary:
    table = TABLE_VH.to(torch.bfloat16)
    return Vocabulary(lambda ids: table[torch.tensor(ids)], make_tokenizer(), len(TABLE_VH))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row_of(vector_H: torch.Tensor) -> int:
    return int((TABLE_VH.to(torch.bfloat16).float() - vector_H).abs().sum(1).argmin())


def test_text_is_repeated_then_cut(vocabulary: Vocabulary) -> None:
    prompt_PH = text("c a b", vocabulary, 5)
    assert [row_of(v) for v in prompt_PH] == [WORDS.index(w) for w in "cabca"]
    assert prompt_PH.dtype == torch.float32
    assert prompt_PH.device.type == "cpu"


def test_long_text_is_cut_and_says_so(
    vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prompt_PH = text("a b c d", vocabulary, 2)
    assert [row_of(v) for v in prompt_PH] == [WORDS.index(w) for w in "ab"]
    assert "has 4 tokens; the first 2" in caplog.text


def test_text_without_tokens_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(BadInput, match=r"init\.text: '  ' has no tokens"):
        text("  ", vocabulary, 3)


def test_tokenizer_of_another_base_is_refused(vocabulary: Vocabulary) -> None:
    small = Vocabulary(vocabulary.lookup, vocabulary.tokenizer, 4)
    with pytest.raises(BadInput, match="gives id 7, but the base has only 4"):
        text("f", small, 1)


def test_vocab_draws_different_ordinary_words(vocabulary: Vocabulary) -> None:
    rows = [row_of(v) for v in vocab(vocabulary, 6, generator())]
    assert sorted(rows) == [2, 3, 4, 5, 6, 7], "special tokens and padding rows are no words"


def test_vocab_repeats_only_when_words_run_out(vocabulary: Vocabulary) -> None:
    rows = [row_of(v) for v in vocab(vocabulary, 14, generator())]
    assert all(rows.count(i) in (2, 3) for i in range(2, 8))


def test_random_has_the_scale_of_the_embeddings(vocabulary: Vocabulary) -> None:
    prompt_PH = random(vocabulary, 2000, generator())
    words_rms = TABLE_VH[2:8].square().mean().sqrt()
    torch.testing.assert_close(prompt_PH.square().mean().sqrt(), words_rms, rtol=0.05, atol=0)


@pytest.mark.parametrize("init", [Init(text="a b"), Init(vocab=True), Init(random=True)])
def test_depends_on_nothing_but_the_generator(vocabulary: Vocabulary, init: Init) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initialize(init, vocabulary, 4, generator(3))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(2)
    assert torch.equal(initialize(init, vocabulary, 4, generator(3)), first)
    assert first.shape == (4, HIDDEN)
    if init.text is None:
        assert not torch.equal(initialize(init, vocabulary, 4, generator(4)), first)


def test_start_is_not_the_base_itself(vocabulary: Vocabulary) -> None:
    table = TABLE_VH.clone()
    shared = Vocabulary(lambda ids: table[ids[0] : ids[0] + 1], vocabulary.tokenizer, len(table))
    text("a", shared, 1).zero_()
    assert torch.equal(table, TABLE_VH), "training a prompt would change the frozen base"
