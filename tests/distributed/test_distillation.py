"""Distillation equals two plain forwards, on two ranks; and a run of the example."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import golden
from tests.distributed.test_run import two_processes


@pytest.fixture(scope="module")
def two(run_ranks: Callable[..., dict[str, Any]], random_base: Path) -> dict[str, Any]:
    return run_ranks("distillation", 2, str(random_base), "int8")


def test_loss_and_gradient_are_those_of_two_plain_forwards(two: dict[str, Any]) -> None:
    """Next to a prompt trained on labels, and for keys and values."""
    assert two["losses"] == pytest.approx(two["expected_losses"], abs=1e-5)
    assert max(two["gradient_errors"]) < 1e-5


def test_any_split_into_batches_gives_the_same_gradient(two: dict[str, Any]) -> None:
    assert max(two["split_errors"]) < 1e-5


def test_ranks_without_distilled_rows_stay_in_step(two: dict[str, Any]) -> None:
    assert two["apart"] == two["alone"] == pytest.approx(two["wanted_apart"], abs=1e-5)


def test_scores_are_divergence_and_agreement(two: dict[str, Any]) -> None:
    taught, bare = two["scores"]
    assert taught["loss"] == pytest.approx(two["losses"][1], abs=1e-5)
    assert taught["agreement"] == pytest.approx(two["agreement"], abs=1e-9)
    assert bare["loss"] > 0
    assert bare["loss"] != taught["loss"]


def test_the_example_learns_from_its_teacher(tmp_path: Path) -> None:
    """After a few steps the prompt is closer to the instruction than the base without a prompt."""
    *words, option, ranks = golden.RUNS["distill"]
    assert (option, ranks) == ("--processes", "2")
    done = two_processes(tmp_path, "trainer", *words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout
    assert "agreement" in done.stdout
    assert "KL divergence" in done.stdout
    assert "the best baseline (no prompt, compared with the teacher of short: " in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    taught, bare = summary["prompts"]["short"], summary["tasks"]["notes"]["untaught"]["short"]
    assert taught["validation_loss"] < bare["validation_loss"]
    (teacher,) = summary["tasks"]["notes"]["teachers"]
    assert teacher["prompts"] == ["short"]
    assert teacher["text"].startswith("Classify the illness")
    assert (
        0 < teacher["validation_loss"] != summary["tasks"]["notes"]["no_prompt"]["validation_loss"]
    )
    assert "teacher of short" in done.stdout
    assert 0 < bare["validation_agreement"] < taught["validation_agreement"] < 1
    golden.compare("distill", tmp_path / "run")
