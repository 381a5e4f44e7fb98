"""Calibration of predicted probabilities of choices. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Equal-width bins of confidence, as in Guo et al. 2017.
BINS = 15


def calibration(
    records: Sequence[Mapping[str, Any]], gold: Sequence[int], choices: Sequence[str]
) -> dict[str, float] | None:
    """Compute ECE and Brier score of the records that have probabilities; None without any.

    ``ece``: expected calibration error of the predicted choice (Guo et al. 2017, arXiv 1706.04599,
    equation 3). ``brier``: mean squared distance of the probabilities from the correct choice,
    summed over choices, 0 to 2 (G. Brier, Monthly Weather Review 78, 1950).

    Args:
        gold: index of the correct choice of every record. (The target of a record may be a
            generated text, which has the white space of the template.)
    """
    rows = [
        (record["probabilities"], right)
        for record, right in zip(records, gold, strict=True)
        if record.get("probabilities") and None not in record["probabilities"].values()
    ]
    if not rows:
        return None
    probabilities_RC = np.asarray([[p[choice] for choice in choices] for p, _ in rows])
    gold_RC = np.asarray([right for _, right in rows])[:, None] == np.arange(len(choices))
    confidence_R = probabilities_RC.max(1)
    correct_R = gold_RC[np.arange(len(rows)), probabilities_RC.argmax(1)]
    bin_R = np.minimum((confidence_R * BINS).astype(int), BINS - 1)
    gaps = [
        abs(float((correct_R[inside] - confidence_R[inside]).sum()))
        for inside in (bin_R == number for number in np.unique(bin_R))
    ]
    brier = float(((probabilities_RC - gold_RC) ** 2).sum(1).mean())
    return {"ece": sum(gaps) / len(rows), "brier": brier}
