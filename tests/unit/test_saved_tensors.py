"""The memory model against what autograd is seen to save, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import CASES
from trainer.data.token_table import Example
from trainer.model.decode_step import DecodeStep
from trainer.model.families import FAMILIES, layer_sizes
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import LOGITS_BYTES, BatchMemory, row_sizes
from trainer.packing.packed_batch import PackedBatch, build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.training.saved_tensors import SavedBytes

LAYERS = 6  # so that the ends are not the most of it
VIRTUAL = 16
ROWS = [40, 33, 31, 30, 24, 52, 28, 29]
CPU = torch.device("cpu")


def batch_of(lengths: list[int]) -> PackedBatch:
    rows = [Example.with_target(tuple(range(3, 3 + n)), n - 4, i) for i, n in enumerate(lengths)]
    return build_packed_batch([PackedRow(row, 0, i) for i, row in enumerate(rows)], [VIRTUAL])


def saved_bytes(base: PromptedBase, batch: PackedBatch) -> int:
    leaf = torch.randn(VIRTUAL, base.hidden_size, requires_grad=True)
    saved = SavedBytes()
    with saved:
        base(batch, [VirtualTokens(leaf)])
    return saved.total


@pytest.mark.parametrize("case", ["llama", "falcon-grouped", "deepseek_v2", "deepseek_v3"])
def test_bytes_of_a_token_in_a_cache(family: Callable[..., Path], case: str) -> None:
    base, rows, tokens = load_unsharded(family(case), "int8"), 2, 5
    cache, ids = base.new_cache(), torch.ones(rows, tokens, dtype=torch.long)
    with base.unpacked():
        base(DecodeStep(ids, torch.ones_like(ids), cache), [])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    memory = BatchMemory(layer_sizes(base.model.config), row_sizes(ROWS, VIRTUAL), 4, LOGITS_BYTES)
    assert held == rows * tokens * memory.cached()


FEW = ["llama", "gpt2", "gemma2", "qwen3_moe"]


@pytest.mark.parametrize(
    ("case", "checkpointing", "dtype"),
    [
        *((case, False, torch.float32) for case in CASES),
        *((case, True, torch.float32) for case in FEW),
        *((case, False, torch.bfloat16) for case in FEW),
    ],
)
def test_estimate_bounds_what_is_saved(
    family: Callable[..., Path], case: str, checkpointing: bool, dtype: torch.dtype
) -> None:
    folder = family(case, LAYERS)
    base, batch = load_unsharded(folder, "int8", checkpointing, dtype), batch_of(ROWS)
    memory = BatchMemory(
        layer_sizes(base.model.config),
        row_sizes(ROWS, VIRTUAL, base.packed, copied=False),
        dtype.itemsize,
        LOGITS_BYTES,
    )
    tokens = len(batch.token_ids_T)
    bytes_per_token = saved_bytes(base, batch) / tokens
    expected = memory.saved(checkpointing, unread=1 - len(batch.distinct_U) / tokens)
    recurrent = FAMILIES[CASES[case][0]].recurrent  # in some layers, counted in all
    most = (4 if recurrent else 1.5) * bytes_per_token
    assert bytes_per_token <= expected <= most, (bytes_per_token, expected)
