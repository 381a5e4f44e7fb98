"""What runs on GPUs, on a device that the CPU plays: nothing is left on the host, few waits for it.

Numbers are those of the CPU; that kernels of a GPU give the same is for tests/gpu.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.family_bases import CASES
from tests.packed_step import IN_BF16, PRODUCTS

ROOT = Path(__file__).resolve().parents[2]
#: Waits in transformers' own code: Falcon takes keys and values by lists of places, Gemma 3n checks
#: the argument of a quantile, and Phi-3 reads the last position.
TRANSFORMERS_WAITS = {"falcon": 4, "falcon-grouped": 4, "gemma3n": 2, "phi3-longrope": 1}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By a process of its own: torch cannot forget a device."""
    out = tmp_path_factory.mktemp("device") / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_other_device", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_every_family_takes_a_step_without_device_waits(results: Any, case: str) -> None:
    step = results["families"][f"{case}-dequantize"]
    assert step["loss"] < 1e-5
    assert step["gradient"] < 1e-4
    # transformers makes masks of padded rows; a router's choice is what experts are called by.
    expected = step["layers_of_experts"] + TRANSFORMERS_WAITS.get(case, 0)
    assert step["padded"] or step["waits"] == expected


@pytest.mark.parametrize(("case", "kind"), PRODUCTS)
def test_int8_matmuls_take_a_step_without_device_waits(results: Any, case: str, kind: str) -> None:
    step = results["families"][f"{case}-{kind}"]
    assert step["loss"] < 1e-2
    assert step["gradient"] < 0.1, "but for what is rounded to the other side"
    # How many features have outliers is known when they have been found.
    assert (step["waits"] > 0) == (kind == "int8_outliers")


@pytest.mark.parametrize("case", IN_BF16)
def test_bfloat16_is_close_to_float32(results: Any, case: str) -> None:
    step = results["families"][f"{case}-bf16"]
    assert step["loss"] < 1e-2
    assert step["gradient"] < 0.1


def test_a_run_ends_as_on_the_cpu(results: Any) -> None:
    """Starts are searched for, prompts trained, one from a teacher, scored and written with."""
    run = results["run"]
    assert max(run["prompts"].values()) < 1e-5
    (expected,), (score,) = run["scores"]
    assert score == pytest.approx(expected, rel=1e-4)
    assert run["texts"][0] == run["texts"][1]
    (wanted, *other_wanted), (found, *others) = run["inspected"]
    assert others == other_wanted, "nearest tokens and descriptions"
    for values, expected_values in zip(found, wanted, strict=True):
        assert values == pytest.approx(expected_values, rel=1e-3, abs=1e-5)


def test_requests_are_answered_and_texts_compared_as_on_the_cpu(results: Any) -> None:
    expected, found = results["inference"]
    assert found["texts"] == expected["texts"]
    assert found["nearest"] == expected["nearest"]
    for state, wanted in zip(found["states"], expected["states"], strict=True):
        assert state == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_a_step_waits_once_and_once_per_prompt(results: Any) -> None:
    """Once for the sums of all packed batches, and once for the norm of each prompt's gradient.

    Ranks that share the head or the embeddings also tell each other what they will send.
    """
    run = results["run"]
    assert run["batches"] > 1
    assert run["waits"] == [1 + len(run["prompts"])] * len(run["waits"])
