"""Sweeps: which prompts a run file's lists become, how they are named, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.unit.test_config import GOOD, problems_of
from trainer import config
from trainer.config import load, sweeps

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@pytest.fixture
def run_file(tmp_path: Path):
    def write(text: str = GOOD) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def names(run: config.RunConfig) -> list[str]:
    return [prompt.name for prompt in run.prompts]


def test_a_grid_is_one_prompt_per_combination(run_file):
    swept = "prompts.one.sweep={learning_rate: [0.01, 3e-3], num_virtual_tokens: [5, 20, 100]}"
    run = load(run_file(), [swept])
    assert names(run) == [
        "one-lr0.01-len005",
        "one-lr0.01-len020",
        "one-lr0.01-len100",
        "one-lr0.003-len005",
        "one-lr0.003-len020",
        "one-lr0.003-len100",
        "two",
    ]
    assert [(p.learning_rate, p.num_virtual_tokens) for p in run.prompts[:-1]] == [
        (rate, length) for rate in (0.01, 0.003) for length in (5, 20, 100)
    ]
    assert {prompt.task for prompt in run.prompts} == {"triage"}
    assert run.prompts[-1].method == "p_tuning", "the prompt behind a sweep is as it was"


def test_a_run_file_without_a_sweep_is_left_alone(run_file):
    assert names(load(run_file())) == ["one", "two"]
    assert sweeps(run_file()) == {}
    assert names(load(run_file(), ["prompts.one.sweep=null"])) == ["one", "two"]


def test_the_saved_run_file_holds_the_prompts_and_no_sweep(run_file):
    run = load(run_file(), ["prompts.one.sweep.grid.seed=[0, 1]"])
    assert names(run) == ["one-seed0", "one-seed1", "two"]
    text = config.dump(run)
    assert load(run_file(text)) == run
    assert not any("sweep" in prompt for prompt in yaml.safe_load(text)["prompts"])


def test_names_in_the_order_of_numbers(run_file):
    rates = [1.0e-4, 3.0e-5, 0.002, 0.1, 12]
    run = load(run_file(), [f"prompts.one.sweep={{learning_rate: {rates}}}"])
    sorted_names = sorted(names(run)[:-1])
    by_name = {prompt.name: prompt.learning_rate for prompt in run.prompts}
    assert [by_name[name] for name in sorted_names] == sorted(rates)
    assert sorted_names[0] == "one-lr00.00003"


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ("method: [prompt_tuning, p_tuning]", ["one-prompt_tuning", "one-p_tuning"]),
        ("max_grad_norm: [null, 1.0]", ["one-clip_none", "one-clip1"]),
        ("init: [vocab, random, {text: Say}]", ["one-vocab", "one-random", "one-text-Say"]),
        ("init: [{text: 'Ä'}, {text: 'Ö'}]", ["one-init1", "one-init2"]),
        ("seed: [3]", ["one"]),
        ("steps: [5, 10], seed: [3]", ["one-steps05", "one-steps10"]),
    ],
)
def test_names_contain_the_settings_that_differ(run_file, lists, expected):
    variant_names = names(load(run_file(), [f"prompts.one.sweep={{{lists}}}"]))[:-1]
    assert variant_names == expected
    assert all(NAME.fullmatch(name) for name in variant_names)


def test_a_part_of_a_grid_is_drawn_by_the_seed_of_the_run(run_file):
    swept = "prompts.one.sweep={random: 6, seed: [0, 1, 2, 3, 4], learning_rate: [0.1, 0.2, 0.3]}"
    full_grid = names(load(run_file(), [swept.replace("random: 6, ", "")]))
    drawn = names(load(run_file(), [swept]))
    assert drawn == names(load(run_file(), [swept]))
    assert len(drawn) == 6 + 1
    assert [name for name in full_grid if name in drawn] == drawn, "in the order of the grid"
    others = [names(load(run_file(), [swept, f"training.seed={seed}"])) for seed in range(1, 4)]
    assert len({tuple(other) for other in [drawn, *others]}) == 4


def test_a_huge_grid_is_drawn_from_without_being_made(run_file):
    lists = ", ".join(
        f"{key}: {[float(i) if key != 'steps' else i for i in range(1, 10001)]}"
        for key in ("learning_rate", "weight_decay", "steps")
    )
    run = load(run_file(), [f"prompts.one.sweep={{random: 3, {lists}}}"])
    assert len(run.prompts) == 4


# What is refused


def test_a_sweep_of_more_than_max_prompts_says_the_count(run_file):
    swept = "prompts.one.sweep={seed: [0, 1, 2], num_virtual_tokens: [1, 2, 3]}"
    (problem,) = problems_of(run_file(), swept, "search.max_prompts=9")
    assert problem == (
        f"override '{swept}': prompts[0].sweep: makes 9 prompts, 10 with those of the other "
        "prompts, but search.max_prompts is 9; shorten its lists, draw some with random: N, or "
        "raise search.max_prompts"
    )
    assert len(load(run_file(), [swept, "search.max_prompts=10"]).prompts) == 10
    thousands = f"prompts.one.sweep={{seed: {list(range(5000))}, steps: {list(range(1, 5001))}}}"
    (problem,) = problems_of(run_file(), thousands)
    assert "makes 25,000,000 prompts" in problem


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("[1, 2]", "sweep: [1, 2] must be a mapping of settings to lists"),
        ("{}", "sweep: is empty; give lists of settings, or remove it"),
        ("{random: 2}", "sweep: is empty; give lists of settings, or remove it"),
        ("{seed: 3}", "sweep.seed: 3 must be a list of values, as [a, b]"),
        ("{seed: []}", "sweep.seed: [] must be a list of values, as [a, b]"),
        ("{seed: [1, 2, 1]}", "sweep.seed: has 1 more than once; remove one"),
        ("{learning_rate: [1e-3, 0.001]}", "sweep.learning_rate: has 0.001 more than once"),
        ("{learning_rate: [1e-3, '0.001']}", "sweep: makes the same prompt twice, 'one-lr1' and"),
        ("{steps: [5, 5.0]}", "sweep: makes the same prompt twice, 'one-steps1' and 'one-steps2'"),
        ("{seed: [null, 0]}", "sweep: makes the same prompt twice, 'one-seed_none' and"),
        ("{init: [vocab, {vocab: yes}]}", "sweep: makes the same prompt twice, 'one-vocab' and"),
        ("{sede: [1]}", "sweep.sede: no setting to sweep (did you mean 'seed'?); known: task,"),
        ("{name: [a, b]}", "sweep.name: no setting to sweep; known: task,"),
        ("{grid: {sede: [1]}}", "sweep.grid.sede: no setting to sweep (did you mean 'seed'?)"),
        ("{grid: {seed: [1]}, steps: [1]}", "sweep: grid: holds all settings with their lists"),
        ("{random: 0, seed: [1, 2]}", "sweep.random: 0 must be a positive integer"),
        (
            "{random: 3, seed: [1, 2]}",
            "sweep.random: 3, but there are only 2 combinations; remove it to take them all",
        ),
    ],
)
def test_bad_sweeps(run_file, sweep, expected):
    (problem,) = problems_of(run_file(), f"prompts.one.sweep={sweep}")
    assert f": prompts[0].{expected}" in problem


def test_a_bad_value_is_reported_once_at_its_line(run_file):
    text = GOOD.replace(
        "    num_virtual_tokens: 5\n",
        "    sweep:\n      seed: [0, 1, 2]\n      learning_rate: [0.1, -0.1]\n",
    )
    assert problems_of(run_file(text)) == [
        "FILE:16: prompts[0].sweep.learning_rate: -0.1 must be greater than 0"
    ]


def test_a_mistake_after_a_sweep_keeps_its_line(run_file):
    text = GOOD.replace("num_virtual_tokens: 5", "sweep: {seed: [0, 1, 2]}")
    text = text.replace("method: p_tuning", "method: p_tunning")
    (problem,) = problems_of(run_file(text))
    assert problem.startswith("FILE:17: prompts[1].method: 'p_tunning' is not one of")


def test_mistakes_of_sweeps_and_of_the_rest_are_reported_together(run_file):
    problems = problems_of(run_file(), "prompts.one.sweep={sede: [1]}", "training.steps=0")
    assert len(problems) == 2


@pytest.mark.parametrize("override", ["seed=3", "init.text=hello"])
@pytest.mark.parametrize("inside", ["sweep", "sweep.grid"])
def test_an_override_of_a_swept_setting_is_refused(run_file, override, inside):
    setting = override.partition("=")[0].partition(".")[0]
    values = "[1, 2]" if setting == "seed" else "[vocab, random]"
    swept = f"prompts.one.{inside}.{setting}={values}"
    assert problems_of(run_file(), swept, f"prompts.one.{override}") == [
        f"override 'prompts.one.{override}': prompts[0].{setting}: has no effect, because the "
        f"sweep has values for it; override prompts[0].{inside}.{setting} with a list"
    ]


def test_two_prompts_with_one_name(run_file):
    text = GOOD.replace("- name: two", "- name: one-seed1")
    (problem,) = problems_of(run_file(text), "prompts.one.sweep.seed=[0, 1]")
    assert problem.endswith("prompts: names must be unique; used more than once: one-seed1")


def test_a_name_that_becomes_too_long(run_file):
    text = GOOD.replace("- name: one", f"- name: {'long' * 19}")
    problems = problems_of(run_file(text), "prompts[0].sweep.seed=[10, 11]")
    assert any("of 83 characters; at most 80 fit" in problem for problem in problems)
