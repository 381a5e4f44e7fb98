"""Standard errors and intervals against drawn samples and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.evaluation.statistics import (
    macro_f1,
    paired_rates,
    paired_ratios,
    rate_standard_error,
    ratio_standard_error,
    wilson_interval,
)


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


def test_standard_error_of_a_rate():
    assert rate_standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert rate_standard_error(0.0, 40) == pytest.approx(rate_standard_error(1.0, 40))
    assert rate_standard_error(1.0, 40) == pytest.approx(1 / 40, rel=0.05)


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(hits, rows, low, high):
    assert wilson_interval(hits / rows, rows) == pytest.approx((low, high), abs=5e-5)
    flipped = wilson_interval(1 - hits / rows, rows)
    assert flipped == pytest.approx((1 - high, 1 - low), abs=5e-5)


def rows(both: int, won: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Which rows are right for the first and for the second of two."""
    first = [True] * (both + won) + [False] * (lost + neither)
    second = [True] * both + [False] * won + [True] * lost + [False] * neither
    return first, second


@pytest.mark.parametrize(
    ("cells", "p_value"),
    [
        ((20, 6, 0, 34), 2 / 2**6),
        ((20, 5, 0, 34), 2 / 2**5),
        ((20, 1, 8, 5), 2 * (1 + 9) / 2**9),
        ((3, 4, 4, 3), 1.0),
        ((5, 0, 0, 5), 1.0),
    ],
)
def test_rates_are_compared_by_the_exact_mcnemar_test(cells, p_value):
    _, won, lost, _ = cells
    comparison = paired_rates(*rows(*cells))
    assert comparison.p_value == pytest.approx(p_value)
    assert comparison.difference == pytest.approx((won - lost) / sum(cells))
    assert comparison.low < comparison.difference < comparison.high
    assert comparison.significant == (p_value < 0.05)
    swapped = paired_rates(*reversed(rows(*cells)))
    assert (swapped.low, swapped.high) == pytest.approx((-comparison.high, -comparison.low))
    assert comparison.detectable_difference >= 6 / sum(cells), (
        "fewer rows that differ are never significant"
    )


@pytest.mark.parametrize(
    "cells",  # both right, only the first, only the second, none
    [(0.5, 0.1, 0.1, 0.3), (0.6, 0.2, 0.05, 0.15), (0.9, 0.04, 0.01, 0.05), (0.1, 0.6, 0.1, 0.2)],
)
@pytest.mark.parametrize("num_rows", [25, 107])
def test_intervals_of_paired_rates_cover_the_true_difference(cells, num_rows):
    generator = np.random.default_rng(3)
    true = cells[1] - cells[2]
    drawn = generator.multinomial(num_rows, cells, 400)
    results = {tuple(counts): paired_rates(*rows(*counts)) for counts in drawn.tolist()}
    compared = [results[tuple(counts)] for counts in drawn.tolist()]
    covered = np.mean([result.low <= true <= result.high for result in compared])
    assert covered >= 0.94
    if true == 0:
        assert np.mean([result.significant for result in compared]) <= 0.06


@pytest.mark.parametrize("num_rows", [10, 40, 200])
def test_wilson_intervals_cover_the_true_rate(num_rows):
    """Exact coverage, averaged over rates: that of a single rate swings around 95%."""
    from scipy.stats import binom

    hits = np.arange(num_rows + 1)
    intervals = np.array([wilson_interval(k / num_rows, num_rows) for k in hits])
    rates = np.linspace(0.02, 0.98, 97)
    covered = [
        binom.pmf(hits, num_rows, rate)[(intervals[:, 0] <= rate) & (rate <= intervals[:, 1])].sum()
        for rate in rates
    ]
    assert 0.94 < np.mean(covered) < 0.97
    assert min(covered) > 0.83


def test_an_interval_excludes_zero_only_where_the_test_is_significant():
    for won in range(12):
        for lost in range(12):
            for neither in (0, 5, 300):
                comparison = paired_rates(*rows(2, won, lost, neither))
                excludes = comparison.low > 0 or comparison.high < 0
                assert comparison.significant or not excludes, (won, lost, neither)


@pytest.mark.parametrize("num_rows", [6, 10, 20, 60, 300])
def test_a_detectable_difference_is_significant_with_80_percent_power(num_rows):
    from scipy.stats import binom

    # rows that differ, all in one direction: significant from 6 on
    detectable = paired_rates([True] * num_rows, [True] * num_rows).detectable_difference
    assert binom.sf(5, num_rows, detectable) >= 0.78
    assert paired_rates([True] * 5, [False] * 5).detectable_difference > 1, "never significant"


def test_ratios_are_compared_row_by_row():
    generator = np.random.default_rng(1)
    spread, errors, significant = [], [], 0
    for _ in range(1000):
        counts = generator.integers(1, 9, 80)
        common = generator.gamma(2.0, 2.0, 80)  # what both find hard
        first, second = (counts * (common + generator.normal(0, 0.3, 80)) for _ in "ab")
        comparison = paired_ratios((first, counts), (second, counts))
        spread.append(comparison.difference)
        errors.append((comparison.high - comparison.low) / (2 * 1.959964))
        significant += comparison.significant
    assert np.mean(errors) == pytest.approx(np.std(spread), rel=0.05)
    assert 0.03 < significant / 1000 < 0.08, "5% where there is no difference"
    few = [paired_ratios((generator.normal(0, 1, 8), [1] * 8), ([0] * 8, [1] * 8)) for _ in spread]
    assert 0.03 < np.mean([one.significant for one in few]) < 0.07, "5% of few rows too"
    assert all(one.significant == (one.low > 0 or one.high < 0) for one in few)
    shifted = paired_ratios((first + 0.5 * counts, counts), (first, counts))
    assert shifted.difference == pytest.approx(0.5)


def test_macro_f1_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    generator = np.random.default_rng(2)
    values = []
    for _ in range(300):
        gold = generator.integers(0, 3, 200)
        predicted = np.where(generator.random(200) < 0.7, gold, generator.integers(0, 4, 200))
        value, error = macro_f1(predicted.tolist(), gold.tolist())
        values.append((value, error))
        assert value == pytest.approx(f1_score(gold, predicted, average="macro"))
    spread = np.std([value for value, _ in values])
    assert np.mean([error for _, error in values]) == pytest.approx(spread, rel=0.1)
