"""Bootstrap over rows: interval, standard error and p-value of any score. Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
#: Values of one batch of resamples; bounds memory.
BATCH_VALUES = 4_000_000
#: Rows from which percentile intervals are used: BCa intervals need one score per left-out row.
MANY_ROWS = 2000


@dataclass(frozen=True)
class Resampled:
    """Distribution of a statistic over resampled rows.

    Attributes:
        interval: 95%.
        p_value: two-sided, of the hypothesis that the statistic is 0.
    """

    interval: tuple[float, float]
    standard_error: float
    p_value: float


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], rows: int
) -> Resampled:
    """Resample rows with replacement; the result is the same at every call.

    Intervals are bias-corrected and accelerated (BCa; B. Efron, Better Bootstrap Confidence
    Intervals, JASA 82, 1987), with many rows percentile intervals. The p-value is the share of
    resamples whose distance from the statistic is at least the distance of the statistic from 0
    (P. Hall and S. Wilson, Two Guidelines for Bootstrap Hypothesis Testing, Biometrics 47, 1991),
    at least the smallest p-value that a test of signs has on so few rows.

    Args:
        statistic: maps indices of rows, [..., rows], to values [...].
    """
    from scipy import stats

    value = float(statistic(np.arange(rows)))
    if rows < 2 or not math.isfinite(value):
        return Resampled((math.nan, math.nan), math.nan, 1.0)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # no BCa interval exists if all resamples are equal
        result = stats.bootstrap(
            (np.arange(rows),),
            lambda index, axis: statistic(index),
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_VALUES // rows),
            method="BCa" if rows < MANY_ROWS else "percentile",
            random_state=np.random.default_rng(0),
        )
    values = result.bootstrap_distribution
    error = float(np.std(values, ddof=1))
    if not np.isfinite(values).all():
        return Resampled((math.nan, math.nan), error, 1.0)
    extreme = int((np.abs(values - value) >= abs(value)).sum())
    p_value = max((1 + extreme) / (1 + RESAMPLES), 2.0 ** (1 - rows)) if value else 1.0
    if error == 0:
        return Resampled((value, value), error, p_value)
    low, high = result.confidence_interval
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = np.quantile(values, [0.025, 0.975])
    return Resampled((float(low), float(high)), error, p_value)
