"""Start ranks on CPU with the environment that the DeepSpeed launcher gives them.

Runs from the command line go through the launcher itself; these ranks are preloaded processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.launcher_command import Devices, environment, free_port
from tests import preloaded

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 400


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that runs ``tests.distributed.MODULE`` on N ranks and reads its JSON."""

    def run(module: str, ranks: int, *arguments: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("ranks")
        out = folder / "result.json"
        logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
        codes = run_module(f"tests.distributed.{module}", str(out), *arguments, logs=logs)
        output = "\n".join(f"{log.name}:\n{log.read_text()[-5000:]}" for log in logs)
        assert codes == [0] * ranks, f"exit codes {codes}\n{output}"
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    return run


def run_module(module: str, *arguments: str, logs: list[Path]) -> list[int | None]:
    """Run ``python -m MODULE`` on a rank per log; return exit codes as ``wait`` does."""
    processes = [
        preloaded.start(module, *arguments, environ=environ, stdout=log, stderr=None)
        for environ, log in zip(environments(len(logs)), logs, strict=True)
    ]
    try:
        return wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environments(ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank of one node."""
    devices = Devices("cpu", tuple(range(ranks)))
    common = environment(os.environ | {"PYTHONPATH": str(ROOT)}, devices, os.cpu_count() or 1)
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    common |= {"CROSS_RANK": "0", "CROSS_SIZE": "1"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def wait(processes: list[preloaded.Process]) -> list[int | None]:
    """Wait until all have ended or one has failed; return exit codes, None for running ones."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(codes):
            return codes
        time.sleep(0.1)
    return [process.poll() for process in processes]


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama with random weights, grouped queries and tied embeddings, and its tokenizer."""
    from benchmarks.random_base import save_random

    return save_random(tmp_path_factory.mktemp("random_base"))
