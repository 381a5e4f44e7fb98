"""pass@k: the estimator, its intervals, and the answers that are sampled for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from tests.thread_ranks import on_thread_ranks
from tests.unit.test_evaluate_arms import BASE, HAND_WRITTEN, make_run
from tests.unit.test_evaluate_results import COST
from tests.unit.test_evaluate_selection import refused, run_folder
from trainer.commands.evaluate.arm import Arm
from trainer.commands.evaluate.arms import ArmBuilder
from trainer.commands.evaluate.options import Options, parse
from trainer.commands.evaluate.results import TaskResults
from trainer.commands.evaluate.rows import RowEncoder
from trainer.commands.evaluate.scoring import ArmScorer
from trainer.commands.evaluate.store import PredictionStore
from trainer.config import Task
from trainer.data.task_data import load_tasks
from trainer.data.tokenization.tokenize import no_progress
from trainer.evaluation import generation
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import generate
from trainer.evaluation.metric_sums import paired_difference, row_sums, score_interval
from trainer.evaluation.pass_at_k import TOP_P, Samples, k_of, pass_at_k
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.evaluation.token_sampling import Sampling
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import TokenBudget
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.reporting.evaluation import cells, remarks, titles

CODE_TASK = {
    "input": "{text}\nWrite a Python function that does this.\nAnswer:",
    "target": " {code}",
    "choices": None,
    "metric": "execution",
    "tests": "tests",
    "max_new_tokens": 24,
    "hand_written": ["Python:\n"],
}
SAMPLES = Samples(6, 1.0)


@pytest.fixture(scope="module")
def base() -> PromptedBase:
    return load_unsharded(BASE, "int8")


def code_run(folder: Path, rows: int = 5, lines: Sequence[str] = ()) -> list[Arm]:
    """Arms of a task of Python functions, with sampled answers."""
    lines = lines or (BASE.parent / "data" / "codegen.valid.jsonl").read_text().splitlines()[:rows]
    config = make_run(folder, **CODE_TASK)
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = load_tasks(config, tokenizer, 512, len(tokenizer))["diet"]
    options = Options(
        folder, metric="pass@2", n_samples=SAMPLES.count, temperature=SAMPLES.temperature
    )
    encoder = RowEncoder(tokenizer, 512, len(tokenizer), None, (), no_progress)
    return ArmBuilder(options, config, data, encoder, [(0, config.prompts[0])], [4]).build()


def evaluator(base: PromptedBase, tokens: int = 4096) -> Evaluator:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return Evaluator(OneRank(), base, tokenizer, TokenBudget(tokens))  # type: ignore[arg-type]


def score(
    folder: Path, base: PromptedBase, arms: list[Arm], done: dict[str, int], tokens: int = 4096
) -> dict[str, list[dict[str, Any]]]:
    """Score the rows that are not done; return the records of all arms."""
    store = PredictionStore(folder)
    for arm in arms:
        store.path("diet", arm.name).parent.mkdir(parents=True, exist_ok=True)
    prompt = VirtualTokens(torch.zeros(4, 128))
    ArmScorer(evaluator(base, tokens), [prompt], [], store).score(arms, done, lambda texts: None)
    return {arm.name: store.records("diet", arm.name) for arm in arms}


def answers(records: dict[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    return {
        name: [(record["predictions"], record["passed"]) for record in own]
        for name, own in records.items()
    }


# The estimator


@pytest.mark.parametrize("samples", range(1, 8))
def test_the_estimator_is_the_share_of_choices_with_an_answer_that_passes(samples: int) -> None:
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        answers = [number < passed for number in range(samples)]
        chosen = list(itertools.combinations(answers, k))
        wanted = sum(map(any, chosen)) / len(chosen)
        assert pass_at_k(samples, passed, k) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("samples", "k"), [(5, 1), (20, 10), (200, 100)])
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_the_estimator_is_unbiased(samples: int, k: int, rate: float) -> None:
    expected = sum(
        comb(samples, c) * rate**c * (1 - rate) ** (samples - c) * pass_at_k(samples, c, k)
        for c in range(samples + 1)
    )
    assert expected == pytest.approx(1 - (1 - rate) ** k)


def test_k_is_at_most_the_number_of_answers() -> None:
    with pytest.raises(ValueError, match=r"pass@3 of 2 answers"):
        pass_at_k(2, 1, 3)


def test_names_of_the_metric() -> None:
    assert [k_of(name) for name in ("pass@1", "pass@100")] == [1, 100]
    others = ("pass@0", "pass@", "pass@k", "pass@-1", "pass@1.5", "pass@01", "execution")
    assert [k_of(name) for name in others] == [None] * len(others)


# Intervals and differences


def sums_of(passed: list[int], samples: int = 4, k: int = 2) -> Any:
    records = [
        {"row": row, "passed": [number < count for number in range(samples)]}
        for row, count in enumerate(passed)
    ]
    task = Task.model_validate(
        {"name": "t", "train": "x.jsonl", "input": "{text}", "target": "{code}"}
        | {"metric": "execution"}
    )
    return row_sums(f"pass@{k}", task, records)


def test_the_score_is_the_mean_over_rows() -> None:
    assert sums_of([0, 1, 4]).score == pytest.approx((0 + 0.5 + 1) / 3)
    assert sums_of([0, 1, 4], k=1).score == pytest.approx((0 + 0.25 + 1) / 3)
    assert np.isnan(sums_of([0, 1], samples=0).score)


def test_no_score_is_certain_because_all_rows_agree() -> None:
    low, high = score_interval("pass@2", sums_of([0] * 20))
    assert low == 0
    assert 0.1 < high < 0.2
    result = paired_difference("pass@2", sums_of([0] * 20), sums_of([0] * 20))
    assert (result.difference, result.p_value) == (0, 1)
    assert result.low < 0 < result.high


def test_intervals_cover_the_true_pass_rate_and_the_true_difference() -> None:
    """Pass rates vary over rows, and each trial draws new answers for both arms."""
    draw = np.random.default_rng(5)
    rows, samples, k, repeats = 40, 6, 2, 400
    covered, differences, significant = 0, 0, 0
    rates = draw.beta(0.3, 0.8, size=1_000_000)
    other = rates**1.5
    expected = [float(np.mean(1 - (1 - values) ** k)) for values in (rates, other)]
    for _ in range(repeats):
        of_rows = draw.integers(len(rates), size=rows)
        sums = [
            sums_of(draw.binomial(samples, values[of_rows]).tolist(), samples, k)
            for values in (rates, other, rates)
        ]
        low, high = score_interval(f"pass@{k}", sums[0])
        covered += low <= expected[0] <= high
        result = paired_difference(f"pass@{k}", sums[0], sums[1])
        differences += result.low <= expected[0] - expected[1] <= result.high
        significant += paired_difference(f"pass@{k}", sums[0], sums[2]).significant
    assert covered / repeats > 0.92
    assert differences / repeats > 0.93
    assert significant / repeats < 0.08


# What is refused before the base is loaded


def test_options_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, **CODE_TASK)
    problem = refused(folder, metric="pass@10", n_samples=5)
    assert "--n-samples: 5 answers per row (given) are fewer than the 10" in problem
    assert "20 answers per row (the default)" in refused(folder, metric="pass@21")
    assert "raise it to 21 or more" in refused(folder, metric="pass@21")
    assert "--temperature: 0 is not from 0.01" in refused(folder, metric="pass@1", temperature=0.0)
    assert "--n-samples: is used with --metric pass@k only" in refused(folder, n_samples=5)
    both = refused(folder, metric="execution", temperature=0.5, n_samples=3)
    assert "--temperature: is used with --metric pass@k only" in both
    assert "write a positive number for k, such as pass@10" in refused(folder, metric="pass@0")


def test_a_task_without_tests(tmp_path: Path) -> None:
    problem = refused(run_folder(tmp_path), metric="pass@1")
    assert "pass@1 needs a task with metric: execution, whose rows have tests" in problem


def test_ranks_get_the_same_options(tmp_path: Path) -> None:
    options = Options(tmp_path, metric="pass@3", n_samples=7, temperature=0.25)
    assert parse(options.arguments()) == options
    assert options.samples == Samples(7, 0.25)
    assert Options(tmp_path, metric="execution").samples is None


# Sampled answers


def test_first_tokens_have_the_distribution_of_transformers(base: PromptedBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("A lion in the grass.\n" + HAND_WRITTEN)["input_ids"]
    stop = StopCriteria(tokenizer, frozenset())
    count = 800
    samplings = [[Sampling(0.9, TOP_P, seed) for seed in range(count)]]
    texts = generate(OneRank(), base, stop, [ids], None, 1, samplings=samplings)
    (alone,) = generate(OneRank(), base, stop, [ids], None, 1)
    drawn = torch.tensor([text.ids[0] for text in texts]).bincount(minlength=len(tokenizer)) / count
    model = load_unsharded(BASE, "int8")
    scored = generate(OneRank(), model, stop, [ids], None, 1, samplings=[[Sampling(0.01, 1.0, 1)]])
    assert scored[0].ids == alone.ids
    log_probabilities = {text.ids[0]: text.log_probability for text in texts}
    tempered = {token: np.exp(value / 0.9) for token, value in log_probabilities.items()}
    total = sum(tempered.values())
    assert max(abs(drawn[token] - p / total) for token, p in tempered.items()) < 0.06


def test_answers_depend_on_neither_batches_nor_other_rows(
    tmp_path: Path, base: PromptedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [arm for arm in code_run(tmp_path) if arm.name != "hand_written-1"]
    names = [arm.name for arm in arms]
    together = score(tmp_path / "a", base, arms, dict.fromkeys(names, 0))
    monkeypatch.setattr(generation, "BATCH_ROWS", 4)
    divided = score(tmp_path / "b", base, arms, dict.fromkeys(names, 0))
    assert answers(divided) == answers(together)
    # an evaluation that was interrupted after two rows
    store = PredictionStore(tmp_path / "c")
    for name in names:
        store.path("diet", name).parent.mkdir(parents=True, exist_ok=True)
        store.append("diet", name, together[name][:2])
    continued = score(tmp_path / "c", base, arms, dict.fromkeys(names, 2))
    assert answers(continued) == answers(together)
    assert any(len(set(texts)) > 1 for texts, _ in answers(together)["no_prompt"])


def test_ranks_share_the_answers_of_a_row() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    stop = StopCriteria(tokenizer, frozenset())
    inputs = [tokenizer(text)["input_ids"] for text in ("A lion.", "A deer near the trees.", "An")]
    samplings = [[Sampling(1.0, TOP_P, 10 * row + i) for i in range(3)] for row in range(3)]

    def program(ranks: Any) -> list[list[int]]:
        model = load_unsharded(BASE, "int8")
        texts = generate(ranks, model, stop, inputs, None, 4, samplings=samplings)
        return [text.ids for text in texts]

    alone = program(OneRank())
    assert len(alone) == 9
    assert on_thread_ranks([0, 1], program) == [alone, alone]


def test_from_rows_to_the_table(tmp_path: Path, base: PromptedBase) -> None:
    arms = code_run(tmp_path)
    texts = ArmScorer(evaluator(base), [], [], None).num_texts(arms, {a.name: 0 for a in arms})
    assert texts == len(arms) * 5 * (1 + SAMPLES.count)
    records = score(tmp_path, base, arms, {arm.name: 0 for arm in arms})
    for record in records["no_prompt"]:
        assert len(record["predictions"]) == len(record["passed"]) == SAMPLES.count
        assert record["temperature"] == SAMPLES.temperature
        assert "correct" not in record
    counts = [sum(record["passed"]) for record in records["no_prompt"]]
    assert any(0 < count < SAMPLES.count for count in counts), "some answers pass"
    task = TaskResults(arms, records, "pass@2", "all", COST, None).evaluation()
    assert (task.metric, task.n_samples, task.temperature) == ("pass@2", 6, 1.0)
    (plain,) = (arm for arm in task.arms if arm.name == "no_prompt")
    wanted = [
        np.mean([any(pair) for pair in itertools.combinations(record["passed"], 2)])
        for record in records["no_prompt"]
    ]
    assert plain.score == pytest.approx(np.mean(wanted))
    assert plain.test == "paired permutation"
    assert titles(task)[0] == "pass@2"
    assert cells(task, plain)[0].startswith(f"{100 * np.mean(wanted):.1f}% (")
    assert any("from 6 answers per row at temperature 1." in line for line in remarks(task))


def test_another_temperature_is_sampled_again(tmp_path: Path) -> None:
    (arm, *_) = code_run(tmp_path)
    digest = arm.digest("base", [], [])
    for samples in (None, Samples(6, 0.5), Samples(7, 1.0)):
        assert json.dumps(arm.digest("base", [], [])) == json.dumps(digest)
        assert type(arm)(**(vars(arm) | {"samples": samples})).digest("base", [], []) != digest


def test_greedy_and_sampled_answers_are_both_kept(tmp_path: Path, base: PromptedBase) -> None:
    """One metric after the other; asking again reads no row again."""
    (sampled, *_) = code_run(tmp_path)
    greedy = replace(sampled, samples=None)
    others = replace(sampled, samples=Samples(3, 0.5))
    store = PredictionStore(tmp_path)

    def opened(arm: Arm) -> int:
        digest = arm.digest("base", [], [])
        return store.open("diet", arm.name, digest, fresh=False, about=arm.about())

    written = {}
    for name, arm in (("greedy", greedy), ("sampled", sampled), ("others", others)):
        assert opened(arm) == 0
        written[name] = score(tmp_path, base, [arm], {arm.name: 0})[arm.name]
    assert "correct" in written["greedy"][0]
    assert [len(record["predictions"]) for record in written["others"]] == [3] * 5
    about = json.loads(store.path("diet", others.name).with_suffix(".json").read_text())
    assert about["sampled"] == {"count": 3, "temperature": 0.5, "top_p": TOP_P}
    for name, arm in (("sampled", sampled), ("greedy", greedy), ("others", others)):
        assert opened(arm) == 5
        assert store.records("diet", arm.name) == written[name]


def test_other_tests_of_a_row_are_run(tmp_path: Path) -> None:
    (arm, *_) = code_run(tmp_path)
    digest = arm.digest("base", [], [])
    lines = [json.loads(line) for line in (tmp_path / "valid.jsonl").read_text().splitlines()]
    changed = [line | {"tests": line["tests"][:1]} for line in lines]
    assert changed != lines
    (other, *_) = code_run(tmp_path, lines=[json.dumps(line) for line in changed])
    assert other.digest("base", [], []) != digest
    (same, *_) = code_run(tmp_path, lines=[json.dumps(line) for line in lines])
    assert same.digest("base", [], []) == digest
