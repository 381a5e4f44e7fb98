"""Gather parameters on a CPU by copies from the memory of the node's other ranks. Linux only.

gloo sends a gathered layer through sockets and copies it into two more buffers. Here each rank
holds its shards in an anonymous file in memory (``memfd_create``), which the kernel deletes with
the last process that uses it. The others read it: one copy, without messages, because shards never
change after loading. Reading the file instead of mapping it keeps their pages out of this process's
resident memory.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Bytes of the file that are mapped at a time; the kernel allocates pages at the first write.
_CHUNK_BYTES = 1 << 30
#: Alignment of a shard, as of torch's tensors.
_ALIGNMENT = 64


class SharedShards:
    """This rank's shards in shared memory, and those of the other ranks of its shard group.

    All ranks allocate the same sizes in the same order, so that a parameter's shard has the same
    place in the file of every rank.
    """

    def __init__(self, rank: int, files: Sequence[int]) -> None:
        """Take over the open files of a group's ranks; ``rank`` is the index of this one."""
        self._rank, self._files = rank, list(files)
        self._chunk: mmap.mmap | None = None
        self._chunk_start, self._end = 0, mmap.PAGESIZE  # the first page holds the token
        self._places: dict[int, int] = {}  # by address
        self._buffers = GatherBuffers()

    @staticmethod
    def open(
        rank: int,
        members: Sequence[int],
        all_gather: Callable[[Any], list[Any]],
    ) -> SharedShards | None:
        """Exchange files with the shard group; None on all ranks if any cannot read another's.

        Args:
            rank: of this process.
            members: ranks of its shard group, in order.
            all_gather: collective over all ranks of the run.
        """
        token = secrets.token_bytes(16)
        own = -1
        with suppress(AttributeError, OSError):  # another system, or forbidden
            own = os.memfd_create("base shards")
            os.pwrite(own, token, 0)
        offers = all_gather((os.getpid(), own, token))
        files = [own if member == rank else _open_of(offers[member]) for member in members]
        if not all(all_gather(min(files) >= 0)):
            for file in files:
                if file >= 0:
                    os.close(file)
            return None
        return SharedShards(list(members).index(rank), files)

    def allocate(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Allocate a shard that the other ranks can read; its elements are zero."""
        num_bytes = num_elements * dtype.itemsize
        if self._chunk is None or self._end + num_bytes > self._chunk_start + len(self._chunk):
            self._chunk_start = self._end = _round_up(self._end, mmap.ALLOCATIONGRANULARITY)
            size = max(_CHUNK_BYTES, _round_up(num_bytes, mmap.PAGESIZE))
            own = self._files[self._rank]
            os.ftruncate(own, self._chunk_start + size)
            self._chunk = mmap.mmap(own, size, offset=self._chunk_start)
        offset = self._end - self._chunk_start
        shard = torch.frombuffer(self._chunk, dtype=dtype, count=num_elements, offset=offset)
        self._places[shard.data_ptr()] = self._end
        self._end += _round_up(num_bytes, _ALIGNMENT)
        return shard

    def gather(self, shard: Tensor) -> Tensor:
        """Concatenate the shards [elements] of all ranks: [ranks * elements]."""
        place, size = self._places[shard.data_ptr()], shard.nbytes
        flat = self._buffers.take(size * len(self._files))
        parts = flat.split(size)
        for rank, file in enumerate(self._files):
            if rank == self._rank:
                np.copyto(parts[rank].numpy(), shard.view(torch.uint8).numpy())  # as memcpy
            else:
                _read(file, memoryview(parts[rank].numpy()), place)
        return flat.view(shard.dtype)

    def close(self) -> None:
        """Free the memory, as far as no tensor uses it."""
        for file in self._files:
            os.close(file)
        self._files, self._chunk, self._buffers = [], None, GatherBuffers()


class GatherBuffers:
    """Memory that gathered parameters use in turn: new pages would cost more than the copies.

    A buffer is used again when no tensor refers to it. Those in use and those kept for the next
    gathers together never exceed the maximum that was in use at a time.

    Attributes:
        held_bytes: of buffers in use and kept ones.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self._free: list[mmap.mmap] = []  # the latest last
        self._returned: deque[mmap.mmap] = deque()
        self._used = self._most = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """Return a uint8 tensor [num_bytes] with unspecified values."""
        with self._lock:
            block = self._take(num_bytes)
        array = np.frombuffer(block, np.uint8)
        # Called in any thread, even inside ``take``; so it only appends.
        weakref.finalize(array, self._returned.append, block).atexit = False
        return torch.from_numpy(array)  # holds the array until its storage is freed

    def _take(self, num_bytes: int) -> mmap.mmap:
        while self._returned:
            block = self._returned.popleft()
            self._used -= len(block)
            self._free.append(block)
        self._used += num_bytes
        self._most = max(self._most, self._used)
        for index in reversed(range(len(self._free))):
            if len(self._free[index]) == num_bytes:
                return self._free.pop(index)
        while self._free and self.held_bytes + num_bytes > self._most:
            self.held_bytes -= len(self._free.pop(0))
        self.held_bytes += num_bytes
        block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        return block


def _open_of(offer: tuple[int, int, bytes]) -> int:
    """Open another process's file, given its PID, descriptor and token; -1 if that is impossible.

    In another PID namespace the PID may belong to another process: the token tells.
    """
    pid, descriptor, token = offer
    try:
        file = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return -1
    with suppress(OSError):
        if os.pread(file, len(token), 0) == token:
            return file
    os.close(file)
    return -1


def _read(file: int, target: memoryview, place: int) -> None:
    done = 0
    while done < len(target):  # the kernel reads at most 2 GB at a time
        count = os.preadv(file, [target[done:]], place + done)
        if count == 0:
            raise RuntimeError("the shared memory of another rank is shorter than its shards")
        done += count


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
