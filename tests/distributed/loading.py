"""Rank program: bytes read and held while loading, and the failure if a weight is NaN.

python -m tests.distributed.loading OUT.json BASE SMALL_BASE SMALL_BASE_WITH_NAN
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed.equivalence import weights_equal
from tests.distributed.sharded_base import run_config, shard_base
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.zero3_sharder import base_bytes
from trainer.runtime.errors import BadInput
from trainer.runtime.process import flush_and_exit


def main() -> None:
    out, folder, small, damaged = sys.argv[1:]
    engine = Engine(120)
    nan_problems: list[str] = []
    try:
        load(engine, damaged)
    except BadInput as error:
        nan_problems = error.problems

    load(engine, small)  # the first to be loaded brings the code that does it
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    base, read, policy = load(engine, folder)
    peak = resident_bytes("VmHWM") - before
    result = {
        "peak": peak,
        "bytes_read": read,
        "base_bytes": base_bytes(base),
        "weights_equal": weights_equal(base, Path(folder), "int8"),
        "nan_problems": nan_problems,
        "released": released_bytes(engine, base, policy),
    }
    base, _, policy = load(engine, folder, share_memory=True)
    result["released_shared"] = released_bytes(engine, base, policy)
    every = engine.all_gather(result)
    if engine.is_main:
        Path(out).write_text(json.dumps({"ranks": every}))
    engine.close()


def load(
    engine: Engine, folder: str, *, share_memory: bool = False
) -> tuple[Any, int, dict[str, Any]]:
    loaded = shard_base(engine, run_config(folder, "int8"), share_memory=share_memory)
    return loaded.model, loaded.stats.bytes_read, loaded.policy


def released_bytes(engine: Engine, base: Any, policy: dict[str, Any]) -> int:
    """Bytes that the process returns when a base that ZeRO-3 ran is released."""
    engine.attach(base, policy)
    with torch.no_grad():
        base(torch.arange(4), [])
    trim = ctypes.CDLL(None).malloc_trim
    trim(0)
    before = resident_bytes("VmRSS")
    engine.release(base)
    assert base_bytes(base) == 0
    trim(0)
    return before - resident_bytes("VmRSS")


def resident_bytes(field: str) -> int:
    """Read a memory field of /proc: ``VmRSS`` (resident now) or ``VmHWM`` (peak)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
