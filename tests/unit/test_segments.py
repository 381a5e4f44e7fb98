"""Ids of texts that are tokenized by segments equal those of the complete texts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.tokenizers_of_families import BYTE_LEVEL, SENTENCE_PIECE, make_tokenizer
from trainer.data.tokenization.segments import SegmentEncoder

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "[/INST]"]
PIECES = [*SPECIALS, " ", "\n", "\n\n", "Hi", " Hello", "it's ", "é", "<", "|>", "<|im_", "3\t"]


def make_encoder(tokenizer: Any) -> tuple[SegmentEncoder, list[str]]:
    """The encoder, and a list of the texts that it has tokenized."""
    texts: list[str] = []

    def encode(some: Any) -> list[list[int]]:
        texts.extend(some)
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in some]

    return SegmentEncoder(tokenizer, encode), texts


def random_texts() -> list[str]:
    random_state = random.Random(5)
    return ["".join(random_state.choices(PIECES, k=12)) for _ in range(150)]


@pytest.mark.parametrize("kind", [*SENTENCE_PIECE, *BYTE_LEVEL])
def test_segments_have_the_ids_of_the_complete_text(kind):
    tokenizer: Any = make_tokenizer(kind, ["Hi Hello it's 3\n\n"] * 20, specials=SPECIALS)
    encoder, texts = make_encoder(tokenizer)
    dialogues = random_texts()
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in dialogues]
    assert encoder(dialogues) == expected
    count = len(texts)
    assert encoder(dialogues[::-1]) == expected[::-1]
    assert len(texts) == count
    assert not set(dialogues) <= set(texts)


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|mask|>", lstrip=True, normalized=False),
        AddedToken("<|word|>", single_word=True, normalized=False),
        AddedToken("<|end|>", rstrip=True, normalized=False),
        AddedToken("hi", normalized=True),
    ],
)
def test_tokens_that_depend_on_the_text_around_them(token):
    tokenizer: Any = make_tokenizer("llama3", ["Hi Hello it's 3\n\n"] * 20, specials=SPECIALS)
    tokenizer.add_tokens([token])
    encoder, _ = make_encoder(tokenizer)
    texts = [text.replace("Hi", token.content) for text in random_texts()]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encoder(texts) == expected


def test_kept_segments_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("trainer.data.tokenization.segments._KEPT_CHARACTERS", 10)
    tokenizer: Any = make_tokenizer("llama3", ["Hi Hello it's 3\n\n"] * 20, specials=SPECIALS)
    encoder, texts = make_encoder(tokenizer)
    first = encoder(["Hi Hello it's"])
    count = len(texts)
    assert encoder(["Hi Hello it's"]) == first
    assert len(texts) == count + 1
