"""Ranks started by the real DeepSpeed launcher, on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.local import Devices, environment, free_port, local_arguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run ``tests.distributed.MODULE`` on N ranks; give back the JSON that rank 0 wrote."""

    def run(module: str, ranks: int, *arguments: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("ranks") / "result.json"
        devices = Devices("cpu", tuple(range(ranks)))
        command = local_arguments(
            f"tests.distributed.{module}", [str(out), *arguments], devices, free_port()
        )
        env = environment(os.environ | {"PYTHONPATH": str(ROOT)}, devices, os.cpu_count() or 1)
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    return run


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with grouped queries and tied embeddings, and its tokenizer."""
    folder = tmp_path_factory.mktemp("random_base")
    subprocess.run(
        [sys.executable, "-m", "tests.random_base", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder
