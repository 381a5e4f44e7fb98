"""Initialisers: lengths, sources, determinism, and what they refuse."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from trainer.config import Init
from trainer.prompts import initializers
from trainer.prompts.initializers import Vocabulary, from_noise, initialize, keys_and_values
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import PrefixKeyValues, VirtualTokens
from trainer.runtime.errors import BadInput

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


def text(source: str, vocabulary: Vocabulary, length: int) -> torch.Tensor:
    return initialize(Init(text=source), vocabulary, length, generator())


def vocab(vocabulary: Vocabulary, length: int, drawing: torch.Generator) -> torch.Tensor:
    return initialize(Init(vocab=True), vocabulary, length, drawing)


def row_of(vector_H: torch.Tensor) -> int:
    return int((TABLE_VH.to(torch.bfloat16).float() - vector_H).abs().sum(1).argmin())


def test_a_text_is_repeated_and_cut_to_the_prompt_length(
    vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prompt_PH = text("c a b", vocabulary, 5)
    assert caplog.text == "", "PEFT repeats too"
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


@pytest.mark.fault("tokenizer of another base")
def test_tokenizer_of_another_base_is_refused(vocabulary: Vocabulary) -> None:
    small = Vocabulary(vocabulary.lookup, vocabulary.tokenizer, 4)
    with pytest.raises(BadInput, match="gives id 7, but the base has only 4"):
        text("f", small, 1)


def test_vocab_draws_different_ordinary_words(vocabulary: Vocabulary) -> None:
    rows = [row_of(v) for v in vocab(vocabulary, 6, generator())]
    assert sorted(rows) == [2, 3, 4, 5, 6, 7], "special tokens and padding rows are no words"


def test_labels_take_turns(vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture) -> None:
    def started(num_virtual_tokens: int) -> str:
        labels = ["a b c", "d", "e f"]
        prompt_PH = initialize(
            Init(labels=True), vocabulary, num_virtual_tokens, generator(), labels
        )
        return "".join(WORDS[row_of(v)] for v in prompt_PH)

    assert started(6) == "adebfc"
    assert caplog.text == ""
    assert started(3) == "ade"
    assert "init labels (a b c, d, e f) have 6 tokens; the first 3 become" in caplog.text
    assert started(8) == "adebfcad"


def test_only_frequent_words_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initializers, "FREQUENT", 3)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["added"])
    table = torch.arange(12.0)[:, None].expand(-1, HIDDEN)
    vocabulary = Vocabulary(lambda ids: table[torch.tensor(ids)], tokenizer, len(table))
    assert {int(v[0]) for v in vocab(vocabulary, 30, generator())} == {2, 3, 4}


def test_bytes_and_added_tokens_are_no_words() -> None:
    tokens = ["<0xE2>", "\u2581", "\u2581a", "<0x0A>", "b"]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_tokens(["added"])
    assert Vocabulary(lambda ids: TABLE_VH, wrapped, 20).words_n.tolist() == [2, 4]


def test_embedding_rows_without_a_token_are_never_drawn() -> None:
    """At the end of the table, as in Qwen 2.5, and between tokens."""
    tokens = {"a": 1, "b": 2, "c": 6, "d": 9}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(tokens)))
    table_VH = torch.arange(9.0)[:, None].expand(-1, HIDDEN)
    vocabulary = Vocabulary(lambda ids: table_VH[torch.tensor(ids)], wrapped, 9)
    assert vocabulary.words_n.tolist() == [1, 2, 6]
    assert {int(v[0]) for v in vocab(vocabulary, 30, generator())} == {1, 2, 6}


def test_vocab_repeats_only_when_words_run_out(vocabulary: Vocabulary) -> None:
    rows = [row_of(v) for v in vocab(vocabulary, 14, generator())]
    assert all(rows.count(i) in (2, 3) for i in range(2, 8))


def test_random_has_the_scale_of_the_embeddings(vocabulary: Vocabulary) -> None:
    prompt_PH = from_noise(vocabulary, 2000, generator())
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


class TestFromATrainedPrompt:
    @pytest.fixture
    def prompt_PH(self, tmp_path: Path) -> torch.Tensor:
        prompt_PH = torch.randn(4, HIDDEN)
        folder = tmp_path / "run" / "prompts" / "one"
        save_peft(folder, VirtualTokens(prompt_PH), "base", num_layers=2, num_attention_heads=1)
        return prompt_PH

    @pytest.mark.parametrize("folder", ["run", "run/prompts/one"])
    @pytest.mark.parametrize("length", [2, 4, 7])
    def test_of_any_length(
        self,
        vocabulary: Vocabulary,
        tmp_path: Path,
        prompt_PH: torch.Tensor,
        caplog: pytest.LogCaptureFixture,
        folder: str,
        length: int,
    ) -> None:
        init = Init.model_validate({"from": str(tmp_path / folder)})
        prompt = initialize(init, vocabulary, length, generator())
        assert torch.equal(prompt, prompt_PH.repeat(2, 1)[:length])
        assert ("has 4 virtual tokens; " in caplog.text) == (length != 4)

    def test_of_a_base_of_another_width_is_refused(
        self, vocabulary: Vocabulary, tmp_path: Path
    ) -> None:
        save_peft(
            tmp_path, VirtualTokens(torch.ones(2, 9)), "base", num_layers=2, num_attention_heads=1
        )
        with pytest.raises(BadInput, match=r"has the shape \(9,\), but this base needs \(6,\)"):
            initialize(Init.model_validate({"from": str(tmp_path)}), vocabulary, 2, generator())

    def test_a_diverged_prompt_is_refused_as_init(
        self, vocabulary: Vocabulary, tmp_path: Path
    ) -> None:
        save_peft(
            tmp_path,
            VirtualTokens(torch.ones(2, HIDDEN)),
            "base",
            num_layers=2,
            num_attention_heads=1,
        )
        weights = {"prompt_embeddings": torch.full((2, HIDDEN), float("nan"))}
        save_file(weights, tmp_path / "adapter_model.safetensors")
        with pytest.raises(BadInput, match="is not finite; name another"):
            initialize(Init.model_validate({"from": str(tmp_path)}), vocabulary, 2, generator())


def test_start_is_not_the_base_itself(vocabulary: Vocabulary) -> None:
    table = TABLE_VH.clone()
    shared = Vocabulary(lambda ids: table[ids[0] : ids[0] + 1], vocabulary.tokenizer, len(table))
    text("a", shared, 1).zero_()
    assert torch.equal(table, TABLE_VH), "training a prompt would change the frozen base"


class TestKeysAndValues:
    """A base whose keys and values [n, 2 layers, 2, 1 head, 3] tell the token and its place."""

    @pytest.fixture
    def reader(self) -> Vocabulary:
        def past(ids: Sequence[int]) -> torch.Tensor:
            keys_values = torch.zeros(len(ids), 2, 2, 1, 3, dtype=torch.bfloat16)
            keys_values[..., 0] = torch.tensor(ids)[:, None, None, None]
            keys_values[..., 1] = torch.arange(len(ids))[:, None, None, None]
            keys_values[:, 1] *= 8
            return keys_values

        return Vocabulary(lambda ids: TABLE_VH[torch.tensor(ids)], make_tokenizer(), 10, past)

    def test_of_a_text_repeated_then_cut(self, reader: Vocabulary) -> None:
        past = keys_and_values(Init(text="c a b"), reader, 5, generator())
        assert past.shape == (5, 2, 2, 1, 3)
        assert past.dtype == torch.float32
        assert [WORDS[int(i)] for i in past[:, 0, 0, 0, 0]] == list("cabca")
        assert past[:, 0, 1, 0, 1].tolist() == [0, 1, 2, 3, 4]  # read as one text

    def test_of_drawn_words(self, reader: Vocabulary) -> None:
        past = keys_and_values(Init(vocab=True), reader, 6, generator())
        assert sorted(past[:, 0, 0, 0, 0].int().tolist()) == [2, 3, 4, 5, 6, 7]
        assert torch.equal(past, keys_and_values(Init(vocab=True), reader, 6, generator()))

    def test_noise_is_as_loud_as_each_layer(self, reader: Vocabulary) -> None:
        past = keys_and_values(Init(random=True), reader, 400, generator())
        loudness = past.square().mean(dim=(0, 2, 3, 4)).sqrt()
        torch.testing.assert_close(loudness[1], 8 * loudness[0], rtol=0.1, atol=0)

    def test_of_labels(self, reader: Vocabulary) -> None:
        past = keys_and_values(Init(labels=True), reader, 4, generator(), ["a b", "c"])
        assert [WORDS[int(i)] for i in past[:, 0, 0, 0, 0]] == list("acba")

    def test_of_a_trained_prefix(self, reader: Vocabulary, tmp_path: Path) -> None:
        trained = torch.randn(3, 2, 2, 1, 3)
        save_peft(tmp_path, PrefixKeyValues(trained), "base", num_layers=0, num_attention_heads=0)
        init = Init.model_validate({"from": str(tmp_path)})
        assert torch.equal(keys_and_values(init, reader, 2, generator()), trained[:2])
        save_peft(
            tmp_path, PrefixKeyValues(trained[:, :1]), "base", num_layers=0, num_attention_heads=0
        )
        with pytest.raises(BadInput, match=r"\(1, 2, 1, 3\), but this base needs \(2, 2, 1, 3\)"):
            keys_and_values(init, reader, 2, generator())

    def test_zero(self, reader: Vocabulary) -> None:
        assert not keys_and_values(Init(zero=True), reader, 4, generator()).any()
