"""Page-locked shards: torch's allocator rounds each allocation up to a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.zero3_sharder import PINNED_BYTES, PinnedMemory

MIB = 1 << 20


def test_shards_share_allocations() -> None:
    """Layers of Qwen3-32B on one rank, and a table that is larger."""
    allocated: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        allocated.append(1 << (len(tensor) - 1).bit_length())
        return tensor

    memory = PinnedMemory(pin)
    sizes = [40 * MIB, 5 * MIB, 5 * MIB, 40 * MIB, *[125 * MIB] * 3, 10_240, 301] * 10
    sizes += [742 * MIB]
    shards = [memory.take(size) for size in sizes]
    assert [len(shard) for shard in shards] == sizes
    assert all(shard.data_ptr() % 64 == 0 for shard in shards)
    assert set(allocated) == {PINNED_BYTES, 1024 * MIB}
    assert sum(allocated) < 1.15 * sum(sizes) < sum(1 << (n - 1).bit_length() for n in sizes)


def test_shards_do_not_overlap() -> None:
    memory = PinnedMemory(lambda tensor: tensor)
    shards = [memory.take(4 * n).view(torch.float32) for n in (3, 0, 100, 17)]
    for number, shard in enumerate(shards):
        shard.fill_(number)
    assert all((shard == number).all() for number, shard in enumerate(shards))
