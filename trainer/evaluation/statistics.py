"""Standard errors, intervals and paired differences of scores on validation rows. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Suffix of the name of a score's standard error.
STANDARD_ERROR = "_standard_error"
RATES = frozenset({"accuracy", "exact_match", "execution"})
#: Two-sided 95% quantile of the normal distribution.
Z95 = 1.959963984540054
#: 80% quantile of the normal distribution.
Z80 = 0.8416212335729143
#: Two-sided level of a test.
SIGNIFICANCE = 0.05
#: A test at this level detects a difference of this many standard errors with 80% power.
POWER_80 = Z95 + Z80
#: Sign patterns that the permutation test of paired fractions draws, and values of one batch.
PERMUTATIONS, PERMUTED_VALUES = 9999, 4_000_000
#: Rows that must differ, all in one direction, before the exact McNemar test is significant.
FEWEST_DISCORDANT = 6
#: Expected number of rows that differ at which that test is significant with 80% power (Poisson).
DISCORDANT_80 = 7.9


def ratio_standard_error(sums_R: Sequence[float], counts_R: Sequence[float]) -> float:
    """Standard error of ``sum(sums) / sum(counts)`` over R independent rows; NaN for one row.

    Source: linearized variance of a ratio, W. G. Cochran, Sampling Techniques (1977), 6.3.
    """
    return _error_of_mean(_influence(sums_R, counts_R))


def ratio_scores(name: str, sums_R: Sequence[float], counts_R: Sequence[float]) -> dict[str, float]:
    """Return ``sum(sums) / sum(counts)``, 0 without counts, and its standard error as scores."""
    total = sum(counts_R)
    return {
        name: sum(sums_R) / total if total else 0.0,
        name + STANDARD_ERROR: ratio_standard_error(sums_R, counts_R),
    }


def rate_standard_error(rate: float, rows: int) -> float:
    """Binomial standard error of a rate over ``rows`` rows.

    Computed from (hits + 1) / (rows + 2), Laplace's rule of succession, so it is not zero if all
    rows are correct: for 40 rows it is about one row.
    """
    smoothed = (rate * rows + 1) / (rows + 2)
    return math.sqrt(smoothed * (1 - smoothed) / rows)


def macro_f1(predicted_R: Sequence[int], gold_R: Sequence[int]) -> tuple[float, float]:
    """Mean F1 of the classes that occur among predictions or gold labels, and its standard error.

    As scikit-learn's ``f1_score(average="macro")``. The standard error is linearized, as that of
    one ratio; NaN for one row.
    """
    predicted, gold = np.asarray(predicted_R), np.asarray(gold_R)
    labels = np.union1d(predicted, gold)
    values, influence_R = [], np.zeros(len(gold))
    for label in labels:
        hits = 2.0 * ((predicted == label) & (gold == label))
        counts = (predicted == label).astype(float) + (gold == label)
        values.append(hits.sum() / counts.sum())
        influence_R += _influence(hits, counts) / len(labels)
    return float(np.mean(values)), _error_of_mean(influence_R)


def wilson_interval(rate: float, rows: float) -> tuple[float, float]:
    """95% score interval of a rate over ``rows`` rows.

    Source: E. B. Wilson, Probable Inference, JASA 22 (1927).
    """
    z2 = Z95**2 / rows
    center, half = rate + z2 / 2, Z95 * math.sqrt((rate * (1 - rate) + z2 / 4) / rows)
    return max(0.0, (center - half) / (1 + z2)), min(1.0, (center + half) / (1 + z2))


def effective_rows(values_R: ArrayLike) -> float:
    """Number of rows whose rate would have the variance of the mean of values from 0 to 1.

    For values that are 0 or 1 it is the number of rows, for all others more. Variances are those
    with one more row of 0 and one of 1, as in ``rate_standard_error``, so that equal values do not
    count as certain.
    """
    values = np.append(np.asarray(values_R, float), [0.0, 1.0])
    mean = values.mean()
    return float((len(values) - 2) * mean * (1 - mean) / values.var())


def normal_interval(mean: float, standard_error: float) -> tuple[float, float]:
    """95% interval of a mean with this standard error."""
    return mean - Z95 * standard_error, mean + Z95 * standard_error


@dataclass(frozen=True)
class Difference:
    """Difference of two scores on the same rows, the first minus the second.

    Attributes:
        low, high: 95% interval.
        p_value: two-sided, under the hypothesis of no difference.
        detectable_difference: difference that the test detects with about 80% power on this number
            of rows, estimated from these rows; above 1 if there are too few rows for a significant
            result.
    """

    difference: float
    low: float
    high: float
    p_value: float
    detectable_difference: float
    test: str

    @property
    def significant(self) -> bool:
        return self.p_value < SIGNIFICANCE


def paired_rates(first_R: Sequence[bool], second_R: Sequence[bool]) -> Difference:
    """Compare two rates of correct rows by the exact McNemar test.

    Each end of the interval is the outer one of two intervals: that of Agresti and Min (Statistics
    in Medicine 24, 2005), which adds half a row to each cell, and the exact one given the number of
    rows that differ (Clopper-Pearson). The result excludes 0 only if the test is significant.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(first_R, bool), np.asarray(second_R, bool)
    rows = len(first)
    won, lost = int((first & ~second).sum()), int((second & ~first).sum())
    center = (won - lost) / (rows + 2)
    error = math.sqrt(won + lost + 1 - (won - lost) ** 2 / (rows + 2)) / (rows + 2)
    low, high = normal_interval(center, error)
    p_value = 1.0
    if won + lost:
        exact = binomtest(won, won + lost)
        p_value, given = float(exact.pvalue), exact.proportion_ci(0.95, "exact")
        share = (won + lost) / rows
        low, high = min(low, (2 * given.low - 1) * share), max(high, (2 * given.high - 1) * share)
    return Difference(
        (won - lost) / rows,
        max(-1.0, low),
        min(1.0, high),
        p_value,
        max(FEWEST_DISCORDANT / rows, min(1.0, DISCORDANT_80 / rows), POWER_80 * error),
        "McNemar exact",
    )


def paired_fractions(first_R: ArrayLike, second_R: ArrayLike) -> Difference:
    """Compare two means of values from 0 to 1, such as pass@k, by a permutation test.

    The test exchanges both values of a row (R. A. Fisher, The Design of Experiments, 1935, section
    21). For values that are 0 or 1 it is the exact McNemar test, and the interval is that of
    Agresti and Min, with squared differences in place of the number of rows that differ. The
    result excludes 0 only if the test is significant.
    """
    from scipy.stats import permutation_test

    difference_R = np.asarray(first_R, float) - np.asarray(second_R, float)
    rows, total = len(difference_R), float(difference_R.sum())
    center = total / (rows + 2)
    error = math.sqrt(float((difference_R**2).sum()) + 1 - total * center) / (rows + 2)
    low, high = normal_interval(center, error)
    differing = difference_R[difference_R != 0]
    p_value = 1.0
    if len(differing) > 1:
        # Exact if there are at most as many sign patterns as resamples.
        result = permutation_test(
            (differing, np.zeros_like(differing)),
            lambda first, second, axis: (first - second).sum(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=PERMUTATIONS,
            batch=max(1, PERMUTED_VALUES // len(differing)),
            random_state=np.random.default_rng(0),
        )
        p_value = float(result.pvalue)
    if p_value >= SIGNIFICANCE:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(
        total / rows,
        max(-1.0, low),
        min(1.0, high),
        p_value,
        POWER_80 * error,
        "paired permutation",
    )


def paired_ratios(
    first_R: tuple[ArrayLike, ArrayLike], second_R: tuple[ArrayLike, ArrayLike]
) -> Difference:
    """Compare two ratios of sums over the same rows, such as losses per token or F1.

    Uses a paired t-test on the rows' linearized contributions to the difference.

    Args:
        first_R, second_R: numerators and denominators of every row.
    """
    from scipy.stats import t

    (first, of_first), (second, of_second) = (
        (np.asarray(sums, float), np.asarray(counts, float)) for sums, counts in (first_R, second_R)
    )
    difference = float(first.sum() / of_first.sum() - second.sum() / of_second.sum())
    error = _error_of_mean(_influence(first, of_first) - _influence(second, of_second))
    freedom = len(first) - 1
    p_value = float(2 * t.sf(abs(difference) / error, freedom)) if error > 0 else 1.0
    quantile = float(t.ppf(1 - SIGNIFICANCE / 2, freedom))
    low, high = difference - quantile * error, difference + quantile * error
    return Difference(difference, low, high, p_value, (quantile + Z80) * error, "paired t-test")


def independent_difference(
    first: tuple[float, float, float],
    second: tuple[float, float, float],
    rows: tuple[int, int] | None = None,
) -> Difference:
    """Compare two scores on different rows.

    The interval combines the intervals of both scores (R. Newcombe, Interval Estimation for the
    Difference Between Independent Proportions, Statistics in Medicine 17, 1998, method 10). The
    p-value is that of Fisher's exact test for rates, else of a normal distribution.

    Args:
        first, second: score and both ends of its 95% interval.
        rows: numbers of rows, if the scores are rates over rows.
    """
    from scipy.stats import fisher_exact, norm

    (a, low_a, high_a), (b, low_b, high_b) = first, second
    low, high = a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)
    error = (high - low) / (2 * Z95)
    if rows is not None:
        hits = [(round(rate * n), n) for rate, n in zip((a, b), rows, strict=True)]
        p_value, test = float(fisher_exact([(k, n - k) for k, n in hits]).pvalue), "Fisher exact"
    else:
        p_value = float(2 * norm.sf(abs(a - b) / error)) if error > 0 else 1.0
        test = "normal"
    return Difference(a - b, low, high, p_value, POWER_80 * error, test)


def _influence(sums_R: ArrayLike, counts_R: ArrayLike) -> NDArray[np.float64]:
    """Linearized contribution of every row to a ratio of sums; the mean is 0."""
    sums, counts = np.asarray(sums_R, float), np.asarray(counts_R, float)
    with np.errstate(invalid="ignore"):  # losses that are not finite
        influence: NDArray[np.float64] = (sums - sums.sum() / counts.sum() * counts) / counts.mean()
    return influence


def _error_of_mean(values_R: NDArray[np.float64]) -> float:
    rows = len(values_R)
    if rows < 2:
        return math.nan
    return float(np.sqrt((values_R**2).sum() / (rows * (rows - 1))))
