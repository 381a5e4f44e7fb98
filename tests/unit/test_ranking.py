"""The rule that ranks prompts and baselines."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from trainer.config.ranking import LAST, Entry, rank, score_key


def entry(name: str, value: float | None, loss: float | None = 1.0, **more: Any) -> Entry:
    scores = {"validation_accuracy": value, "validation_f1": value, "validation_loss": loss}
    scores = {key: x for key, x in scores.items() if x is not None}
    return Entry(name=name, scores=scores, **more)


def names(entries: list[Entry], metric: str = "accuracy") -> list[str]:
    return [e.name for e in rank(entries, metric)]


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_metric_then_loss_then_length_then_order(metric):
    entries = [
        entry("worst metric, best loss", 0.5, 0.1, num_virtual_tokens=1),
        entry("higher loss", 0.9, 4.0, num_virtual_tokens=1),
        entry("longer", 0.9, 0.5, num_virtual_tokens=20),
        entry("first", 0.9, 0.5, num_virtual_tokens=5),
        entry("second", 0.9, 0.5, num_virtual_tokens=5),
    ]
    expected = ["first", "second", "longer", "higher loss", "worst metric, best loss"]
    for mixed in itertools.permutations(entries):
        if mixed.index(entries[3]) < mixed.index(entries[4]):
            assert names(list(mixed), metric) == expected


def test_a_loss_is_better_where_it_is_lower():
    entries = [entry("high", 0.9, 2.0), entry("low", 0.1, 1.0)]
    assert names(entries, "loss") == ["low", "high"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ranks_last(bad):
    entries = [entry("nan", bad), entry("nan loss", 1.0, bad), entry("poor", 0.01, 9.0)]
    assert names(entries) == ["poor"]
    assert score_key(entries[0].scores, "accuracy") == LAST
    assert score_key(entries[1].scores, "loss") == LAST
    assert score_key({}, "accuracy") == LAST


def test_diverged_prompts_have_no_rank_and_eliminated_ones_the_last():
    entries = [
        entry("diverged", 1.0, diverged=True),
        entry("eliminated", 0.9, eliminated=True),
        entry("kept", 0.1),
    ]
    assert names(entries) == ["kept", "eliminated"]


def test_a_baseline_without_a_loss_is_ranked_behind_equal_ones():
    assert names([entry("majority", 0.7, None), entry("prompt", 0.7, 3.0)]) == [
        "prompt",
        "majority",
    ]


def test_losses_of_different_kinds_are_not_compared():
    labels = [entry("a", 0.5, 3.0), entry("b", 0.5, 2.0)]
    taught = [entry("c", 0.5, 0.2, teacher="one"), entry("d", 0.5, 0.1, teacher="one")]
    other = [entry("e", 0.5, 0.05, teacher="another")]
    assert names([*labels, *taught], "loss") == ["b", "a"]
    assert names(taught, "loss") == ["d", "c"]
    assert names([*taught, *other], "loss") == []
    # By a metric all are comparable, but a tie is not broken by such losses.
    assert names([*labels, *taught, *other]) == ["a", "b", "c", "d", "e"]
    assert names(taught) == ["d", "c"]
