"""Which prompts go on at a rung, and which one is taken in the end."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.config.run import Halving
from trainer.results import _selected
from trainer.search import (
    Candidate,
    ratio_standard_error,
    rungs,
    select,
    share_standard_error,
    shown_scores,
    worst,
)


@pytest.mark.parametrize(
    ("eta", "first", "last", "expected"),
    [
        (3, 50, 1000, {50, 150, 450}),
        (2, 1, 8, {1, 2, 4}),
        (3, 50, 50, set()),
        (3, 50, 150, {50}),
    ],
)
def test_rungs_stand_before_the_last_step(eta, first, last, expected):
    assert rungs(Halving(eta=eta, first=first), last) == expected
    assert rungs(None, last) == set()


@pytest.mark.parametrize(
    ("losses", "eta", "expected"),
    [
        ([5.0, 1.0, 4.0, 2.0, 3.0], 2, [0, 2]),
        ([5.0, 1.0, 4.0, 2.0, 3.0], 3, [0, 2, 4]),
        ([1.0], 3, []),
        ([2.0, 1.0], 3, [0]),
        ([1.0, 1.0, 1.0], 3, [1, 2]),
        ([math.nan, 9.0, -math.inf, 8.0], 2, [0, 2]),
        ([math.nan, math.nan], 2, [1]),
        ([], 3, []),
    ],
)
def test_all_but_one_of_eta_are_stopped(losses, eta, expected):
    found = dict(enumerate(losses))
    assert worst(found, eta) == expected
    assert worst(dict(reversed(found.items())), eta) == expected
    assert len(found) - len(expected) == math.ceil(len(found) / eta)


def test_standard_error_of_a_loss_is_its_spread_over_drawn_rows():
    generator = np.random.default_rng(0)

    def draw(rows: int) -> tuple[list[float], list[int]]:
        counts = generator.integers(1, 9, rows)
        return (generator.gamma(2.0, 0.5, rows) * counts).tolist(), counts.tolist()

    drawn = [draw(60) for _ in range(2000)]
    spread = np.std([sum(sums) / sum(counts) for sums, counts in drawn])
    errors = [ratio_standard_error(*rows) for rows in drawn]
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
    assert math.isnan(ratio_standard_error([1.0], [1]))


def test_standard_error_of_rows_of_one_label_is_that_of_a_mean():
    values = [0.5, 1.5, 4.0, 2.0]
    expected = np.std(values, ddof=1) / 2
    assert ratio_standard_error(values, [1] * 4) == pytest.approx(expected)


def test_standard_error_of_a_share():
    assert share_standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert share_standard_error(0.0, 40) == pytest.approx(share_standard_error(1.0, 40))
    assert share_standard_error(1.0, 40) == pytest.approx(1 / 40, rel=0.05)


def candidate(name: str, tokens: int, score: float, error: float = 0.02) -> Candidate:
    return Candidate(name, tokens, score, error)


def test_the_shortest_within_one_standard_error_of_the_best():
    found = select(
        [
            candidate("long", 50, 0.95),
            candidate("short", 5, 0.94),
            candidate("shorter", 3, 0.92),
            candidate("middle", 20, 0.935),
        ],
        "accuracy",
    )
    assert found is not None
    assert (found["prompt"], found["best"], found["score"]) == ("short", "long", 0.94)
    assert found["why"] == (
        "the shortest (5 virtual tokens) within one standard error (0.0200) of the best, long "
        "(50 virtual tokens): validation accuracy 0.9400 against 0.9500"
    )


def test_of_losses_the_low_ones_are_good():
    prompts = [candidate("a", 20, 0.30), candidate("b", 5, 0.31), candidate("c", 2, 0.35)]
    found = select(prompts, "loss")
    assert found is not None
    assert (found["prompt"], found["best"]) == ("b", "a")


def test_of_equally_short_ones_the_better():
    prompts = [candidate("a", 5, 0.93), candidate("b", 5, 0.94), candidate("c", 9, 0.94)]
    found = select(prompts, "accuracy")
    assert found is not None
    assert (found["prompt"], found["best"]) == ("b", "b")
    assert "no shorter prompt than its 5 virtual tokens comes within" in found["why"]


def test_scores_that_are_not_numbers_are_left_out():
    assert select([candidate("a", 5, math.nan)], "loss") is None
    assert select([], "loss") is None
    found = select([candidate("a", 1, math.nan), candidate("b", 5, 2.0, math.nan)], "loss")
    assert found is not None
    assert found["why"] == "the only prompt: validation loss 2.0000 with 5 virtual tokens"


def test_a_divergence_from_a_teacher_is_no_rival_of_a_cross_entropy():
    own = {"task": "t", "num_virtual_tokens": 4, "stopped": None}
    scored = own | {"validation_loss_standard_error": 0.1}
    prompts: dict[str, Any] = {
        "labelled": scored | {"objective": "labels", "validation_loss": 1.0},
        "distilled": scored | {"objective": "distill", "validation_loss": 0.1},
    }
    data: Any = SimpleNamespace(task=SimpleNamespace(metric="loss"), evaluation={}, teachers={})
    for names, best in ((["labelled", "distilled"], "labelled"), (["distilled"], "distilled")):
        found = _selected({"t": data}, {name: prompts[name] for name in names})
        assert found["t"]["prompt"] == best
    teachers = {"distilled": SimpleNamespace(index=0), "other": SimpleNamespace(index=1)}
    data.teachers = teachers
    others = dict.fromkeys(teachers, prompts["distilled"])
    assert _selected({"t": data}, others) == {}, "how far from one says nothing of another"
    assert shown_scores(prompts["labelled"]) == prompts["labelled"]
    shown = shown_scores(prompts["distilled"])
    assert shown["validation_KL_divergence"] == 0.1
    assert "validation_loss" not in shown
