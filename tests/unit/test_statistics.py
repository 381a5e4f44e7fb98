"""Standard errors and intervals against drawn samples and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.statistics import rate_standard_error, ratio_standard_error, wilson_interval


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
