"""Which prompts stay at a rung of halving, and which one is selected in the end."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import pytest

from trainer.config import RunConfig
from trainer.config.ranking import Entry
from trainer.config.training import Halving
from trainer.cost_model.run_time import _prompt_steps
from trainer.evaluation.selection import select, standard_error
from trainer.training.halving import rungs, split

REVIEWS = Path(__file__).parent / "data/drug_reviews_correct.json"


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


def test_planned_steps_are_those_of_the_prompts_that_rungs_keep():
    """Of four prompts that learn labels, two stop at the rung; of each teacher's one, none."""
    labels = [{"name": f"p{i}"} for i in range(4)]
    distilled = [{"name": t, "objective": "distill", "teacher": t} for t in ("a", "b")]
    config = RunConfig.model_validate(
        {
            "output_dir": "out",
            "base": {"model": "m"},
            "tasks": [{"name": "t", "train": "x.jsonl", "input": "{x}", "target": "{y}"}],
            "prompts": [{"task": "t", **prompt} for prompt in [*labels, *distilled]],
            "training": {"steps": 10},
            "search": {"halving": {"eta": 2, "first": 6}},
        }
    )
    assert _prompt_steps(config) == 4 * 6 + 2 * 4 + 2 * 10


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


#: Trained arms, as ``num_virtual_tokens`` of a test.
ARMS = {"PEFT LoRA r8": 40, "PEFT prompt tuning, text": 20, "ours, prompt_tuning, system": 10}


def reviews() -> dict[str, list[int]]:
    """Correctness of 150 drug reviews by trained arm, from a run of benchmarks.learning."""
    return {arm: [int(c) for c in rows] for arm, rows in json.loads(REVIEWS.read_text()).items()}


def on_rows(correct: dict[str, list[int]], rows: Sequence[int]) -> list[Entry]:
    return [entry(arm, ARMS[arm], fmean(c[i] for i in rows)) for arm, c in correct.items()]


def test_the_standard_error_on_recorded_drug_reviews_is_that_of_resampled_rows():
    draw = random.Random(0)
    for arm, correct in reviews().items():
        score = entry(arm, 1, fmean(correct))
        resampled = [fmean(draw.choices(correct, k=150)) for _ in range(2000)]
        assert standard_error(score, "accuracy", 150) == pytest.approx(stdev(resampled), rel=0.1)


def test_the_rule_keeps_the_score_on_recorded_drug_reviews():
    """On half of the rows it takes the smaller prompt that is as good, never the clearly worse.

    LoRA (72.0%) is better than both prompts (60.0% and 56.0%) by more than a standard error. Of
    the prompts alone, the smaller one is within one standard error of the other on most halves.
    """
    correct, draw = reviews(), random.Random(0)
    halves = [draw.sample(range(150), 75) for _ in range(200)]

    def advised(arms: dict[str, list[int]], rows: Sequence[int]) -> str:
        chosen = select(
            on_rows(arms, rows), "accuracy", lambda e: standard_error(e, "accuracy", 75)
        )
        assert chosen is not None
        best, shorter = chosen
        return (shorter or best).name

    all_arms = [advised(correct, rows) for rows in halves]
    assert all_arms.count("PEFT LoRA r8") > 0.9 * len(halves)
    prompts = {arm: c for arm, c in correct.items() if "LoRA" not in arm}
    chosen = [advised(prompts, rows) for rows in halves]
    assert chosen.count("ours, prompt_tuning, system") > 0.6 * len(halves)
    unseen = [[i for i in range(150) if i not in rows] for rows in map(set, halves)]
    lost = [
        max(fmean(c[i] for i in rows) for c in prompts.values())
        - fmean(prompts[name][i] for i in rows)
        for name, rows in zip(chosen, unseen, strict=True)
    ]
    assert fmean(lost) < math.sqrt(0.25 / 75), "on new rows, less than one standard error"
