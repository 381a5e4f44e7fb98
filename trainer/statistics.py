"""Standard errors, intervals and paired differences of scores on validation rows. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Ending of the names of scores that are the standard error of another.
STANDARD_ERROR = "_standard_error"
#: Two-sided 95% quantile of the normal distribution.
Z95 = 1.959963984540054


def ratio_standard_error(sums_R: Sequence[float], counts_R: Sequence[int]) -> float:
    """Standard error of ``sum(sums) / sum(counts)`` over R rows drawn alike; NaN for one row.

    Source: linearised variance of a ratio, W. G. Cochran, Sampling Techniques (1977), 6.3.
    """
    rows, total = len(sums_R), sum(counts_R)
    if rows < 2:
        return math.nan
    ratio = sum(sums_R) / total
    squares = sum((s - ratio * n) ** 2 for s, n in zip(sums_R, counts_R, strict=True))
    return math.sqrt(squares * rows / (rows - 1)) / total


def rate_standard_error(rate: float, rows: int) -> float:
    """Binomial standard error of a rate over ``rows`` rows.

    Computed from (hits + 1) / (rows + 2), Laplace's rule of succession: for 40 rows that are all
    correct it is about one row, not zero.
    """
    smoothed = (rate * rows + 1) / (rows + 2)
    return math.sqrt(smoothed * (1 - smoothed) / rows)


def wilson_interval(rate: float, rows: int) -> tuple[float, float]:
    """95% score interval of a rate over ``rows`` rows.

    Source: E. B. Wilson, Probable Inference, JASA 22 (1927).
    """
    z2 = Z95**2 / rows
    center, half = rate + z2 / 2, Z95 * math.sqrt((rate * (1 - rate) + z2 / 4) / rows)
    return max(0.0, (center - half) / (1 + z2)), min(1.0, (center + half) / (1 + z2))


def normal_interval(mean: float, standard_error: float) -> tuple[float, float]:
    """95% interval of a mean with this standard error."""
    return mean - Z95 * standard_error, mean + Z95 * standard_error
