"""The base model of benchmarks: a Llama with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: 110M parameters; layers and embeddings have the size ratio of common small models.
LLAMA_110M = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def make_base(folder: Path, shape: dict[str, Any]) -> None:
    """Write a model folder with random weights; ``shape`` has settings of ``LlamaConfig``."""
    from benchmarks.random_base import llama_config, save_random

    save_random(folder, llama_config(**shape))
