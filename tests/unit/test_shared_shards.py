"""Ranks of a node read each other's shards from memory, and use the same buffers in turn."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from trainer.distributed import shared_shards
from trainer.distributed.shared_shards import GatherBuffers, SharedShards

RANKS = 3


def on_ranks(work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Call ``work(rank, all_gather)`` in a thread per rank."""
    barrier, values = threading.Barrier(RANKS), [None] * RANKS

    def run(rank: int) -> Any:
        def all_gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait(60)
            every = list(values)
            barrier.wait(60)
            return every

        return work(rank, all_gather)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(run, range(RANKS)))


def test_every_rank_gathers_the_shards_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_shards, "_CHUNK_BYTES", 8192)  # the second shard needs its own
    shapes = ((5, torch.int8), (3000, torch.float32), (7, torch.bfloat16))

    def work(rank: int, all_gather: Callable[[Any], list[Any]]) -> list[torch.Tensor]:
        shared = SharedShards.open(rank, range(RANKS), all_gather)
        assert shared is not None
        shards = [shared.allocate(number, dtype) for number, dtype in shapes]
        for index, shard in enumerate(shards):
            assert not shard.any()
            shard.fill_(10 * index + rank)
        all_gather(None)  # all have written
        gathered = [shared.gather(shard) for shard in shards]
        all_gather(None)  # all have read
        shared.close()
        return gathered

    for gathered in on_ranks(work):
        for index, (number, dtype) in enumerate(shapes):
            parts = [torch.full((number,), 10 * index + rank, dtype=dtype) for rank in range(RANKS)]
            torch.testing.assert_close(gathered[index], torch.cat(parts), rtol=0, atol=0)


@pytest.mark.parametrize("problem", ["no memfd_create", "no such process", "another process"])
def test_no_rank_shares_memory_if_one_cannot(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    def work(rank: int, all_gather: Callable[[Any], list[Any]]) -> SharedShards | None:
        def with_problem(value: Any) -> list[Any]:
            if isinstance(value, tuple) and rank == 1:
                pid, file, token = value
                value = {
                    "no memfd_create": (pid, -1, token),
                    "no such process": (2**30, file, token),
                    "another process": (pid, file, b"\0" * len(token)),
                }[problem]
            return all_gather(value)

        return SharedShards.open(rank, range(RANKS), with_problem)

    files = len(os.listdir("/proc/self/fd"))
    assert on_ranks(work) == [None] * RANKS
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_buffer_is_used_again_when_no_tensor_refers_to_it() -> None:
    buffers = GatherBuffers()
    tensor = buffers.take(4096)
    address, view = tensor.data_ptr(), tensor.view(torch.float32)[3:]
    view.fill_(7)
    del tensor
    assert buffers.take(4096).data_ptr() != address
    assert view.eq(7).all()
    del view
    assert address in {each.data_ptr() for each in (buffers.take(4096), buffers.take(4096))}


def test_buffers_never_exceed_what_was_used_at_a_time() -> None:
    buffers = GatherBuffers()
    for pages in (1, 2, 3, 4, 2, 3):  # of sizes that cannot be used again
        tensor = buffers.take(4096 * pages)
        del tensor
        assert buffers.held_bytes <= 4096 * 4
    both = [buffers.take(4096 * 4), buffers.take(4096)]
    assert buffers.held_bytes == 4096 * 5
    assert len(both) == 2
