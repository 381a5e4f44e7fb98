"""Memory that loading frees is returned to the system."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from trainer.model.shard_loading import return_freed_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def kept_bytes(context: AbstractContextManager[Any]) -> int:
    """Allocate and free blocks between others that are kept; return how much stays resident."""
    for _ in range(3):  # glibc now keeps smaller allocations for reuse
        block = bytearray(b"x") * (20 << 20)
        del block
    with context:
        before, held = resident_bytes(), []
        blocks = []
        for _ in range(20):
            blocks.append(bytearray(b"x") * (4 << 20))
            held.append(bytearray(b"x") * (1 << 16))
        blocks.clear()
        return resident_bytes() - before


def in_a_child(context: AbstractContextManager[Any]) -> int:
    """Measure in a process of its own: glibc remembers what was allocated before."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writing, str(kept_bytes(context)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as result:
        kept = int(result.read())
    os.waitpid(child, 0)
    return kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a feature of glibc")
def test_freed_memory_is_returned_immediately() -> None:
    assert in_a_child(nullcontext()) > 20 << 20, "glibc returned the memory by itself"
    assert in_a_child(return_freed_memory()) < 4 << 20
