"""What is known of processes, and memory that goes back to the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from trainer.runtime.process import ended_by, process_start


@pytest.mark.parametrize(
    ("end", "number"), [("pass", 0), ("raise SystemExit(3)", 0), ("os.kill(os.getpid(), 9)", 9)]
)
def test_how_a_process_ended_that_nobody_has_waited_for(end: str, number: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import os; {end}"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ended_by(child.pid) == number
    assert process_start(child.pid) == ""
    child.wait()


#: Pieces that are read and done with, between others that are held: how much stays resident.
PIECES = """
import sys
from contextlib import nullcontext
from pathlib import Path
from trainer.runtime.process import freed_at_once
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
for _ in range(3):  # glibc now keeps what is smaller for the next
    piece = bytearray(b"x") * (20 << 20)
    del piece
with freed_at_once() if sys.argv[1] == "given back" else nullcontext():
    before, held = resident(), []
    pieces = []
    for _ in range(10):
        pieces.append(bytearray(b"x") * (4 << 20))
        held.append(bytearray(b"x") * (1 << 16))
    pieces.clear()
    print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_is_freed_goes_back_at_once() -> None:
    kept = {}
    for how in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", PIECES, how], capture_output=True, text=True, check=True
        )
        kept[how] = int(done.stdout)
    assert kept["kept"] > 10 << 20, "nothing to prove here"
    assert kept["given back"] < 4 << 20
