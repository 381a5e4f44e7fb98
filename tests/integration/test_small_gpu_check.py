"""``python -m benchmarks.gpu_check --small``: the check of a GPU, without one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.gpu_check.__main__ import main
from tests import preloaded

pytestmark = pytest.mark.integration
PARTS = ["products", "attention", "out_of_memory", "tests", "train_int8", "train_bank"]


def start(module: str, arguments: Sequence[str], log: Path, _: float) -> int | None:
    """Fork a process that has the libraries imported, in place of ``runner.start_process``."""
    process = preloaded.start(
        *(module, *arguments),
        environ=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=log,
        stderr=None,
    )
    try:
        return process.wait(400)  # not the limit, which is for a GPU
    finally:
        process.kill()


def test_every_kind_of_part_runs_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--small", "--out", str(tmp_path), "--minutes", "60", "--only", *PARTS]
    code = main(given, start)
    (document,) = tmp_path.glob("gpu-check-*.json")
    report = json.loads(document.read_text())
    outcomes = {part["name"]: (part["status"], part["log"]) for part in report["parts"]}
    assert outcomes == dict.fromkeys(["card", *PARTS[:4], "base", *PARTS[4:]], ("passed", []))
    assert code == 0

    results = {part["name"]: part["result"] for part in report["parts"]}
    assert set(results["products"]["rows"][0]["seconds"]) == {
        *("dequantize", "int8", "int8x2", "int8_outliers")
    }
    assert all(row["difference"] < 1e-4 for row in results["attention"]["rows"])
    assert results["out_of_memory"]["splits"] >= 1
    assert results["train_bank"]["prompts"] == 2
    assert results["train_bank"]["share_of_bf16_roofline"] > 0
    page = document.with_suffix(".md").read_text()
    assert report["card"] in page
    assert page.strip() in capsys.readouterr().out
    for title in ("tests/gpu", "Products", "Attention", "Out of memory", "Training"):
        assert f"## {title}" in page
