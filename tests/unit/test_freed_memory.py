"""Memory that loading frees is returned to the system, and by choice also memory of training."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

#: Allocates and frees blocks between others that are kept, and prints how much stays resident.
PROGRAM = """
import sys
from contextlib import nullcontext
from pathlib import Path
from trainer.runtime.freed_memory import return_freed_memory
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


#: Saves tensors beside temporary ones, as a forward pass does, and prints the resident bytes.
FORWARD = """
import sys
from pathlib import Path
import torch
from trainer.runtime.freed_memory import return_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
with return_freed_memory(reuse=sys.argv[1] == "reuse"):
    pass
saved = []
torch.ones(1 << 18).mul(2)  # loads the code
before = resident()
for _ in range(20):
    temporary = [torch.ones((1 << 18) + 999 * i) for i in range(4)]  # 1 MiB and more each
    saved.append(temporary[0] * temporary[1][: 1 << 18])
    del temporary
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a feature of glibc")
def test_memory_of_training_is_returned_without_reuse_or_as_the_environment_says() -> None:
    grown = {}
    for how, threshold in (("reuse", None), ("return", None), ("reuse", "65536")):
        own = {} if threshold is None else {"MALLOC_MMAP_THRESHOLD_": threshold}
        done = subprocess.run(
            [sys.executable, "-c", FORWARD, how],
            env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | own,
            capture_output=True,
            text=True,
            check=True,
        )
        grown[how, threshold] = int(done.stdout)
    assert grown["reuse", None] > 22 << 20, grown
    assert grown["return", None] < 22 << 20, grown
    assert grown["reuse", "65536"] < 22 << 20, grown
