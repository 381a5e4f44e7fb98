"""Golden losses: losses by step and final scores of example runs, kept as data.

One file per kind of device, ``cpu.json`` or ``cuda-NAME.json``; where a device has no file, the
comparison is skipped. ``python -m tests.golden`` writes the file of this machine. Regenerate it
only for a change that is meant to change numbers, and say so in the commit.

Kernels round differently on other processors, with other thread counts and in other versions of
torch. Each run records its environment: in the same environment the numbers must be equal to the
last bit, in any other they must agree within ``TOLERANCE``, or ``RANKS_TOLERANCE`` if the number of
ranks differs too.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.runtime.process import read_text

ROOT = Path(__file__).resolve().parents[2]
#: The trained prompt ``triage`` of the quickstart, for tests that need a trained one.
TRIAGE_PROMPT = Path(__file__).parent / "triage_prompt.safetensors"
#: Arguments of ``promptshard train`` by the name of the run.
RUNS = {
    "quickstart": ["examples/quickstart.yaml"],
    "distill": [
        "examples/distill.yaml",
        *("training.steps=6", "evaluation.every=6", "training.tokens_per_step=512"),
        *("tasks.notes.max_validation_rows=40", "tasks.notes.shifted_validation=null"),
        *("--processes", "2"),
    ],
}
#: Absolute. Losses of the quickstart differ by less than 1e-6 without vector instructions
#: (ATEN_CPU_CAPABILITY=default), and on one rank instead of two by 0.021 at one step and 1e-4 at
#: the end.
TOLERANCE, RANKS_TOLERANCE = 1e-3, 0.05


def device_name() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda-" + re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()


def golden_file() -> Path:
    return Path(__file__).parent / f"{device_name()}.json"


def environment(ranks: int) -> dict[str, Any]:
    """What decides how kernels round, besides the code."""
    result = {"torch": torch.__version__, "ranks": ranks}
    if torch.cuda.is_available():
        return result | {"cuda": torch.version.cuda}
    text = read_text("/proc/cpuinfo")
    processor = [re.search(rf"{key}\s*: (\S+)", text) for key in ("vendor_id", "family", "model")]
    return result | {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        # MKL and oneDNN choose their kernels by it
        "processor": " ".join(match[1] for match in processor if match),
        "cores": len(os.sched_getaffinity(0)),  # the launcher divides them among the ranks
    }


def record(output: Path) -> dict[str, Any]:
    """Read the numbers of a finished run: training losses by step and final scores, by prompt."""
    summary = json.loads((output / "summary.json").read_text())
    losses: dict[str, list[float]] = {name: [] for name in summary["prompts"]}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "train_loss" in entry["metrics"]:
            losses[entry["prompt"]].append(entry["metrics"]["train_loss"])
    scores = {
        name: {key: value for key, value in prompt.items() if "validation_" in key}
        for name, prompt in summary["prompts"].items()
    }
    return {
        "environment": environment(summary["world_size"]),
        "losses": losses,
        "scores": scores,
    }


def compare(name: str, output: Path) -> None:
    """Assert that a run of ``RUNS`` has the golden numbers of this device."""
    path = golden_file()
    if not path.exists():
        pytest.skip(f"no golden losses of {device_name()}; python -m tests.golden writes them")
    expected, actual = json.loads(path.read_text())[name], record(output)
    remedy = "if the change is meant to change numbers, run python -m tests.golden"
    if actual["environment"] == expected["environment"]:
        assert actual == expected, remedy
        return
    same_ranks = actual["environment"]["ranks"] == expected["environment"]["ranks"]
    tolerance = TOLERANCE if same_ranks else RANKS_TOLERANCE
    assert actual["losses"].keys() == expected["losses"].keys()
    for prompt, losses in expected["losses"].items():
        assert actual["losses"][prompt] == pytest.approx(losses, abs=tolerance), remedy
        scores = pytest.approx(expected["scores"][prompt], abs=tolerance)
        assert actual["scores"][prompt] == scores, remedy
