"""Which prompts stay at a rung of halving, and which one is selected in the end."""

from __future__ import annotations

import math

import pytest

from trainer.config.ranking import Entry
from trainer.config.training import Halving
from trainer.evaluation.selection import select
from trainer.training.halving import rungs, split


@pytest.mark.parametrize(
    ("eta", "first", "last", "expected"),
    [
        (3, 50, 1000, {50, 150, 450}),
        (2, 1, 8, {1, 2, 4}),
        (3, 50, 50, set()),
        (3, 50, 150, {50}),
    ],
)
def test_rungs_are_before_the_last_step(eta, first, last, expected):
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
        ([math.inf, 9.0, math.inf, 8.0], 2, [0, 2]),
        ([math.inf, math.inf], 2, [1]),
        ([], 3, []),
    ],
)
def test_all_but_one_of_eta_are_stopped(losses, eta, expected):
    losses_by_prompt = {k: (loss, 0.0) for k, loss in enumerate(losses)}
    kept, stopped = split(losses_by_prompt, eta)
    assert stopped == expected
    assert sorted(kept + stopped) == sorted(losses_by_prompt)
    assert [losses[k] for k in kept] == sorted(losses[k] for k in kept)
    assert split(dict(reversed(losses_by_prompt.items())), eta) == (kept, stopped)
    assert len(losses_by_prompt) - len(expected) == math.ceil(len(losses_by_prompt) / eta)


def entry(name: str, tokens: int, accuracy: float, loss: float = 1.0, **end: bool) -> Entry:
    scores = {"validation_accuracy": accuracy, "validation_loss": loss}
    return Entry(name=name, num_virtual_tokens=tokens, scores=scores, **end)


def selected(entries: list[Entry], metric: str = "accuracy", error: float = 0.02):
    selection = select(entries, metric, lambda _: error)
    return None if selection is None else tuple(e and e.name for e in selection)


def test_the_best_is_selected_and_the_shortest_within_one_standard_error_is_advice():
    entries = [
        entry("long", 50, 0.95),
        entry("short", 5, 0.94),
        entry("shorter", 3, 0.92),
        entry("middle", 20, 0.935),
    ]
    assert selected(entries) == ("long", "short")
    assert selected(entries, error=0.001) == ("long", None)
    assert selected(entries, error=math.nan) == ("long", None)
    assert selected(entries[1:2]) == ("short", None)


def test_lower_losses_survive_halving():
    entries = [entry("a", 20, 0, 0.30), entry("b", 5, 0, 0.31), entry("c", 2, 0, 0.35)]
    assert selected(entries, "loss") == ("a", "b")


def test_an_eliminated_prompt_is_neither_selected_nor_advised_unless_none_is_left():
    out = [entry("out", 2, 0.99, eliminated=True), entry("out-2", 1, 0.98, eliminated=True)]
    assert selected([*out, entry("in", 20, 0.9)]) == ("in", None)
    assert selected(out) == ("out", "out-2")


def test_nothing_is_selected_where_nothing_has_a_score():
    assert selected([]) is None
    assert selected([entry("a", 1, math.nan), entry("b", 1, 0.9, diverged=True)]) is None
