"""Memory that loading frees is returned to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: Allocates and frees blocks between others that are kept, and prints how much stays resident.
PROGRAM = """
import sys
from contextlib import nullcontext
from pathlib import Path
from trainer.model.shard_loading import return_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
for _ in range(3):  # glibc now keeps smaller allocations for reuse
    block = bytearray(b"x") * (20 << 20)
    del block
with return_freed_memory() if sys.argv[1] == "returned" else nullcontext():
    before, held = resident(), []
    blocks = []
    for _ in range(10):
        blocks.append(bytearray(b"x") * (4 << 20))
        held.append(bytearray(b"x") * (1 << 16))
    blocks.clear()
    print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a feature of glibc")
def test_freed_memory_is_returned_immediately() -> None:
    kept = {}
    for how in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
        )
        kept[how] = int(done.stdout)
    assert kept["kept"] > 10 << 20, "glibc returned the memory by itself"
    assert kept["returned"] < 4 << 20
