"""Baselines that an earlier run has scored are read, and only where nothing differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.one_rank import OneRank
from tests.unit.test_chat import make_tokenizer
from tests.unit.test_evaluation import load
from tests.unit.test_label_prefixes import CHOICES, Knows
from trainer.data.task_data import TaskData
from trainer.evaluation.baseline_cache import WORTHWHILE, BaselineCache
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.model.prompted_model import ForwardResult
from trainer.packing.activation_memory import TokenBudget

LARGE = int(WORTHWHILE)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    rows = [{"text": text, "label": "c"} for text in "abde"]
    task = {"input": "{text}", "target": " {label}", "choices": CHOICES, "metric": "accuracy"}
    return load(tmp_path, rows, **task, hand_written=["hi there "])


class Counts(Knows):
    """Counts its forward passes."""

    forwards = 0

    def __call__(self, *args: Any) -> ForwardResult:
        self.forwards += 1
        return super().__call__(*args)


def score(data: TaskData, cache: BaselineCache | None) -> tuple[list[Any], int, int]:
    """Results without a prompt, forward passes, and results that were read."""
    base: Any = Counts(make_tokenizer(), packed=True)
    evaluator = Evaluator(
        OneRank(),  # type: ignore[arg-type]
        base,
        make_tokenizer(),
        TokenBudget(64),
        baselines=cache,
    )
    scored = evaluator.score([Request(data.evaluation["validation"], None)], [])
    return scored, base.forwards, evaluator.reused


def test_the_second_run_computes_nothing_and_has_the_same_scores(data: TaskData) -> None:
    first, forwards, reused = score(data, BaselineCache({"base": 1}, LARGE))
    assert (forwards > 0, reused) == (True, 0)
    again, forwards, reused = score(data, BaselineCache({"base": 1}, LARGE))
    assert (forwards, reused) == (0, 1)
    assert again[0].scores == first[0].scores
    assert torch.equal(again[0].nll_RC, first[0].nll_RC)
    assert score(data, None)[0][0].scores == first[0].scores


@pytest.mark.parametrize("other", ["base", "size", "rows", "cut short", "damaged"])
def test_the_cache_misses_when_any_input_differs(
    data: TaskData, tmp_path: Path, other: str
) -> None:
    score(data, BaselineCache({"base": 1}, LARGE))
    (file,) = (tmp_path / "cache" / "baselines").iterdir()
    cache = BaselineCache({"base": 2 if other == "base" else 1}, 1 if other == "size" else LARGE)
    content = file.read_bytes()
    if other == "cut short":
        file.write_bytes(content[:-9])
    if other == "damaged":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    if other == "rows":
        data.evaluation["validation"] = data.evaluation["validation"].subset([0, 1, 3])
    _, forwards, reused = score(data, cache)
    assert (forwards > 0, reused) == (True, 0)


def test_only_the_base_without_a_trained_prompt_is_kept(data: TaskData) -> None:
    validation = data.evaluation["validation"]
    assert Request(validation, None).is_baseline
    assert not Request(validation, 0).is_baseline


def test_non_finite_results_are_not_cached(data: TaskData, tmp_path: Path) -> None:
    rows = data.evaluation["validation"].candidates
    cache = BaselineCache({}, LARGE)
    cache.write(rows, np.full((len(rows), len(CHOICES)), np.nan))
    assert cache.read(rows) is None
