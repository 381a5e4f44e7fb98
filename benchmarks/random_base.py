"""Write small causal language models with random weights, for tests and benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 300


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the words ``w3`` to ``w299``."""
    special = ["<pad>", "<eos>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), VOCAB_SIZE)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def llama_config(**changes: object) -> LlamaConfig:
    settings: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(settings | changes))


def save_random(folder: Path, config: PretrainedConfig | None = None, seed: int = 0) -> Path:
    """Write a model folder; weights are large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = config or llama_config()
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    save_random(Path(sys.argv[1]))
