"""On a CUDA device: page-locked shards, and tokens that are sampled there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.unsharded_base import load_unsharded
from trainer.config import PROJECT_ROOT
from trainer.distributed.zero3_sharder import PinnedMemory
from trainer.evaluation.token_sampling import Sampling, TokenChooser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_parts_of_an_allocation_are_page_locked(dtype: torch.dtype) -> None:
    memory = PinnedMemory(torch.Tensor.pin_memory)
    shards = [memory.take(dtype.itemsize * size).view(dtype) for size in (1000, 3, 77)]
    for number, shard in enumerate(shards):
        assert shard.is_pinned()
        shard.fill_(number)
    on_gpu = [shard.to("cuda", non_blocking=True) for shard in shards]
    assert all((shard == number).all() for number, shard in enumerate(on_gpu))


def test_sampled_tokens_repeat_with_their_seed() -> None:
    model = load_unsharded(PROJECT_ROOT / "examples" / "tiny_base", "int8").model
    device = torch.device("cuda", 0)
    logits_V = torch.linspace(0, 3, model.config.vocab_size, device=device)

    def sampled(seed: int) -> list[int]:
        chooser = TokenChooser(model, [1, 2], 8, Sampling(temperature=0.8, seed=seed), device)
        return [chooser.choose([1, 2], logits_V, 0).token_id for _ in range(8)]

    assert sampled(1) == sampled(1) != sampled(2)
