"""Sizes of the check: on a GPU, and small ones that a CPU computes in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.matmul import SIZES, Work
from benchmarks.random_base import VOCAB_SIZE

VIRTUAL_TOKENS = 20
#: Llama 3.1 8B.
SHAPE: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SMALL_SHAPE = SHAPE | {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128}
SMALL_SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts.

    Attributes:
        square: side of the square matrix product that measures the peak speed.
        rounds: timings of each product and attention.
        products: tokens, type and shapes of the linear layers.
        long_row: tokens of each row in the comparison of attention with long rows.
        attention_tokens, heads, kv_heads, head_size: of one attention layer.
        memory_shape: of the base that runs out of memory.
        memory_tokens: tokens of the packed batch that does not fit.
        shape: of the base of the training runs.
        step_tokens: text tokens of one step, over all prompts.
        bank: number of prompts that are compared with one.
        steps: of a training run; the first ``warm_up`` are not timed.
    """

    square: int = 8192
    rounds: int = 10
    products: Work = field(default_factory=lambda: SIZES["cuda"])
    attention_tokens: int = 8192
    long_row: int = 1024
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    memory_shape: dict[str, Any] = field(
        default_factory=lambda: SHAPE | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2}
    )
    memory_tokens: int = 16_384
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)
    step_tokens: int = 16_384
    bank: int = 16
    steps: int = 10
    warm_up: int = 4


FULL = Sizes()
SMALL = Sizes(
    square=64,
    rounds=1,
    products=Work(40, torch.float32, {"attention": (64, 64), "up": (128, 64)}),
    attention_tokens=160,
    long_row=40,
    heads=4,
    kv_heads=2,
    head_size=16,
    memory_shape=SMALL_SHAPE,
    memory_tokens=400,
    shape=SMALL_SHAPE,
    step_tokens=256,
    bank=2,
    steps=2,
    warm_up=1,
)
