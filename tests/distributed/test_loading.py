"""Each rank reads little more than its shard; a bad weight ends all ranks with one message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_base import llama_config, save_random

SHAPE: dict[str, object] = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("large_base"), llama_config(**SHAPE))


@pytest.fixture(scope="module")
def ranks(
    run_ranks: Callable[..., dict[str, Any]],
    large_base: Path,
    random_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    damaged = tmp_path_factory.mktemp("damaged") / "base"
    shutil.copytree(random_base, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan  # a row that rank 1 reads
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    return run_ranks("loading", 2, *map(str, (large_base, random_base, damaged)))["ranks"]


def test_a_rank_reads_half_of_the_file(ranks: Any, large_base: Path) -> None:
    size = (large_base / "model.safetensors").stat().st_size
    assert size > 100e6
    assert max(rank["bytes_read"] for rank in ranks) <= 0.51 * size


def test_peak_memory_is_the_shard_and_two_tensors(ranks: Any, large_base: Path) -> None:
    tensors = load_file(large_base / "model.safetensors").values()
    largest = max(tensor.nbytes for tensor in tensors)
    for rank in ranks:
        assert rank["peak"] <= rank["base_bytes"] + 2 * largest


def test_a_base_that_is_released_leaves_its_memory(ranks: Any) -> None:
    for released in ("released", "released_shared"):
        assert all(rank[released] >= 0.9 * rank["base_bytes"] for rank in ranks)


def test_shards_hold_the_checkpoint(ranks: Any) -> None:
    assert all(rank["weights_equal"] for rank in ranks)


def test_nan_that_one_rank_read_ends_all(ranks: Any) -> None:
    (problem,) = ranks[0]["nan_problems"]
    assert "model.safetensors" in problem
    assert "'model.layers.1.mlp.up_proj.weight' holds NaN" in problem
    assert ranks[1]["nan_problems"] == [problem]
