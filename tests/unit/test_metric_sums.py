"""Metrics from records equal those of their libraries; intervals cover; calibration by hand."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from trainer.config import Task
from trainer.evaluation.bootstrap import bootstrap
from trainer.evaluation.calibration import calibration
from trainer.evaluation.metric_sums import (
    METRICS,
    metric_problem,
    paired_difference,
    row_sums,
    score_interval,
)
from trainer.evaluation.statistics import wilson_interval

CHOICES = ["a", "b", "c"]


def task(**settings: Any) -> Task:
    values = {"name": "t", "train": "x.jsonl", "input": "{text}", "target": "{label}"}
    return Task.model_validate(values | settings)


def choice_records(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    records = []
    for _ in range(rows):
        gold, predicted = draw.choice(CHOICES[:2]), draw.choice(CHOICES)
        correct = gold == predicted
        records.append({"row": 1, "target": gold, "prediction": predicted, "correct": correct})
    return records


def test_rates_and_macro_f1_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    records = choice_records(50)
    gold, predicted = ([record[key] for record in records] for key in ("target", "prediction"))
    choices = task(choices=CHOICES, metric="accuracy")
    assert row_sums("accuracy", choices, records).score == accuracy_score(gold, predicted)
    macro = row_sums("macro_f1", choices, records).score
    assert macro == pytest.approx(f1_score(gold, predicted, average="macro"))


def test_losses() -> None:
    records = [{"row": 1, "loss": 3.0, "tokens": 2}, {"row": 2, "loss": 1.0, "tokens": 3}]
    assert row_sums("loss", task(), records).score == pytest.approx(0.8)
    assert row_sums("perplexity", task(), records).score == pytest.approx(np.exp(0.8))
    records[0]["loss"] = None
    assert np.isnan(row_sums("loss", task(), records).score)


TEXTS = [
    ("the cat sat on the mat", "the cat sat on a mat today"),
    ("dogs run", "the dogs run fast in the park"),
    ("", "nothing at all"),
    ("a bird sings in the old tree", "a bird sings in the old tree"),
]


def test_bleu_is_that_of_the_corpus_and_is_resampled_by_row() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    records = [{"row": 1, "prediction": text, "target": target} for text, target in TEXTS]
    sums = row_sums("bleu", task(), records)
    for rows in ([0, 1, 2, 3], [0, 0, 3, 3], [0, 1]):  # without equal sequences of four words
        texts, targets = zip(*(TEXTS[row] for row in rows), strict=True)
        wanted = sacrebleu.corpus_bleu(list(texts), [list(targets)]).score / 100
        assert sums.at(rows).score == pytest.approx(wanted)
        assert float(sums.scores_of(np.array(rows))) == pytest.approx(wanted)


@pytest.mark.parametrize(("metric", "package"), [("rouge_l", "rouge_score"), ("chrf", "sacrebleu")])
def test_text_metrics_of_equal_and_different_texts(metric: str, package: str) -> None:
    pytest.importorskip(package)
    records = [{"row": 1, "prediction": text, "target": target} for text, target in TEXTS]
    assert row_sums(metric, task(), records[3:]).score == pytest.approx(1)
    assert 0.2 < row_sums(metric, task(), records).score < 0.9


def test_rouge_l_counts_words_of_all_scripts() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for text, target, wanted in (
        ("Привет, мир", "привет мир!", 1.0),
        ("今日は雨です", "今日は晴れです", 10 / 13),  # 5 equal characters of 6 and 7
        ("été froid", "été chaud", 0.5),
        ("It's a snake_case name: x1.", "a snake case NAME", None),
    ):
        if wanted is None:
            wanted = scorer.score(target, text)["rougeL"].fmeasure
        records = [{"row": 1, "prediction": text, "target": target}]
        assert row_sums("rouge_l", task(), records).score == pytest.approx(wanted)


def test_metrics_that_do_not_suit_a_task() -> None:
    usable = {
        name: [metric for metric in METRICS if metric_problem(metric, settings) is None]
        for name, settings in {
            "text": task(),
            "choices": task(choices=CHOICES),
            "sentences": task(choices=["It is a heart condition.", "Other."]),
            "labels": task(choices=CHOICES, multi_label=True, metric="f1"),
            "code": task(metric="execution"),
            "tokens": Task.model_validate({"name": "t", "train": "x.jsonl", "tokens": {}}),
        }.items()
    }
    texts = ["exact_match", "rouge_l", "bleu", "chrf"]
    assert usable == {
        "text": [*texts, "loss", "perplexity"],
        "choices": ["accuracy", "macro_f1", "exact_match", "rouge_l", "chrf", "loss", "perplexity"],
        "sentences": ["accuracy", "macro_f1", *texts, "loss", "perplexity"],
        "labels": ["exact_match", "f1", "loss", "perplexity"],
        "code": ["exact_match", "execution", "loss", "perplexity"],
        "tokens": ["loss", "perplexity"],
    }
    problem = metric_problem("accuracy", task())
    assert problem is not None
    assert problem.startswith("accuracy needs choices, with one label per row; use exact_match,")


def test_bootstrap_intervals_cover_the_mean_of_skewed_losses() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        values = draw.exponential(size=80)
        low, high = bootstrap(lambda index, v=values: v[index].mean(-1), 80).interval
        covered += low < 1 < high
    assert 51 <= covered <= 60  # 95% of 60 is 57; fewer than 51 has probability 0.002


def test_paired_differences_cover_and_rarely_reject_equal_arms() -> None:
    """Two arms whose losses differ by noise with mean 0.1 or 0, on rows of very unequal losses."""
    draw = np.random.default_rng(2)
    covered = rejected = 0
    for _ in range(20):
        row_R = draw.exponential(3, size=40)
        arms = [
            [{"row": 1, "loss": float(loss), "tokens": 1} for loss in row_R + shift + noise_R]
            for shift in (0.1, 0.0, 0.0)
            for noise_R in [draw.normal(0, 0.2, size=40)]
        ]
        first, second, third = (row_sums("loss", task(), records) for records in arms)
        result = paired_difference("loss", first, second)
        assert result.test == "paired bootstrap"
        assert result.difference == pytest.approx(first.score - second.score)
        covered += result.low < 0.1 < result.high
        rejected += paired_difference("loss", second, third).p_value < 0.05
    assert covered >= 16
    assert rejected <= 4


def test_rates_use_exact_tests_and_wilson_intervals() -> None:
    settings = task(choices=CHOICES, metric="accuracy")
    first, second = (row_sums("accuracy", settings, choice_records(40, seed)) for seed in (1, 2))
    assert paired_difference("accuracy", first, second).test == "McNemar exact"
    low, high = score_interval("accuracy", row_sums("accuracy", settings, choice_records(40)))
    assert 0 < low < high < 1


def test_equal_arms_have_no_difference() -> None:
    records = [{"row": 1, "loss": loss, "tokens": 2} for loss in (1.0, 2.0, 5.0)]
    sums = row_sums("loss", task(), records)
    result = paired_difference("loss", sums, sums)
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("metric", ["macro_f1", "rouge_l", "bleu"])
def test_scores_without_spread_are_neither_certain_nor_equal(metric: str) -> None:
    """All rows wrong beside all rows right, or two equal arms."""
    settings = task(choices=["a b c d", "e f g h"], metric="accuracy")
    right = [{"row": i, "target": "a b c d", "prediction": "a b c d"} for i in range(40)]
    wrong = [record | {"prediction": "e f g h"} for record in right]
    worst, best = (row_sums(metric, settings, records) for records in (wrong, right))
    assert (worst.score, best.score) == pytest.approx((0, 1))
    low, high = score_interval(metric, worst)
    assert (low, high) == pytest.approx(wilson_interval(0, 40))
    assert score_interval(metric, best)[0] < 0.95
    result = paired_difference(metric, worst, best)
    assert result.difference == pytest.approx(-1)
    assert result.p_value < 0.001
    assert -1 <= result.low < result.high < -0.8
    equal = paired_difference(metric, best, best)
    assert (equal.difference, equal.p_value) == (0, 1)
    assert equal.low < 0 < equal.high


def test_two_rows_are_too_few_for_a_significant_loss() -> None:
    first, second = (
        row_sums("loss", task(), [{"row": i, "loss": loss, "tokens": 1} for i in range(2)])
        for loss in (2.0, 1.0)
    )
    result = paired_difference("loss", first, second)
    assert (result.difference, result.p_value) == (1, 0.5)


def test_calibration_by_hand() -> None:
    rows = [("a", 0.9, "a"), ("b", 0.9, "a"), ("a", 0.6, "a"), ("b", 0.6, "b")]
    records = [
        {"target": f" {gold}", "probabilities": {top: p, {"a": "b", "b": "a"}[top]: 1 - p}}
        for gold, p, top in rows
    ]
    result = calibration(records, ["ab".index(gold) for gold, _, _ in rows], ["a", "b"])
    assert result is not None
    assert result["ece"] == pytest.approx((abs(1 - 1.8) + abs(2 - 1.2)) / 4)
    assert result["brier"] == pytest.approx(2 * (0.01 + 0.81 + 0.16 + 0.16) / 4)
    assert calibration([{"target": "a"}], [0], ["a", "b"]) is None
