"""Small tokenizers that treat the beginning of a text like those of real model families."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
#: The split of Llama 3 and Qwen: a space or a sign goes with the word behind it.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SENTENCE_PIECE = ("llama", "prepend", "first", "always")
BYTE_LEVEL = ("gpt2", "llama3")


def make_tokenizer(
    kind: str, texts: Iterable[str], vocab_size: int = 600, specials: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on a few texts.

    Args:
        kind: ``llama``: the class of Llama 1 and 2; ``prepend``: a normalizer puts ``▁`` in front,
            as in Mistral 0.1 and Mixtral; ``first``, ``always``: a Metaspace pre-tokenizer does;
            ``gpt2``, ``llama3``: byte-level BPE without and with BOS.
        specials: further special tokens.
    """
    if kind in BYTE_LEVEL:
        return _byte_level(kind, texts, vocab_size, specials)
    vocab, merges = _sentence_piece(texts, vocab_size, specials)
    if kind == "llama":
        tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
        tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
        return tokenizer
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    inner = Tokenizer(model)
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(inner, "<s> $A", specials)


def _sentence_piece(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges within words, with bytes to fall back to."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *_BYTES, *specials],
        show_progress=False,
    )
    trained.train_from_iterator([line for text in texts for line in text.split("\n")], trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


def _byte_level(
    kind: str, texts: Iterable[str], vocab_size: int, specials: Sequence[str]
) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "llama3":
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return _wrapped(inner, "$A" if kind == "gpt2" else "<s> $A", specials)


def _wrapped(inner: Tokenizer, template: str, specials: Sequence[str]) -> PreTrainedTokenizerFast:
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(specials),
    )
