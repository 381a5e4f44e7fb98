"""On CUDA devices: shards in host memory, and several ranks with NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.quickstart import first_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
#: The same products and the same split into packed batches, so that only sums round differently.
SAME = {"base__matmul": "dequantize", "base__dtype": "float32"}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return first_steps(tmp_path_factory.mktemp("one"), **SAME)


def test_offloaded_shards_give_the_same_losses(tmp_path: Path, one_rank: dict[str, Any]) -> None:
    policy = "ds_configs/zero3_offload_cpu.json"
    _assert_equal(first_steps(tmp_path, engine__deepspeed=policy, **SAME), one_rank)


@needs_two
@pytest.mark.parametrize("shard_group", ["world", "1"])
def test_two_ranks_give_the_same_losses(
    tmp_path: Path, one_rank: dict[str, Any], shard_group: str
) -> None:
    _assert_equal(first_steps(tmp_path, 2, engine__shard_group=shard_group, **SAME), one_rank)


@needs_two
def test_two_ranks_with_offloaded_shards(tmp_path: Path, one_rank: dict[str, Any]) -> None:
    policy = "ds_configs/zero3_offload_cpu.json"
    _assert_equal(first_steps(tmp_path, 2, engine__deepspeed=policy, **SAME), one_rank)


def _assert_equal(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, prompt in expected.items():
        loss = result[name]["validation_loss"]
        assert loss == pytest.approx(prompt["validation_loss"], rel=0.02), name
