"""pass@k: the probability that at least one of k sampled answers passes all tests of its row.

Source: M. Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374, section
2.1. Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from math import comb

#: How the metric is written in options and messages.
PASS_AT_K = "pass@k"
#: Answers are sampled from the fewest most probable tokens whose probabilities add up to this, as
#: in section 3.2 of the source.
TOP_P = 0.95


@dataclass(frozen=True)
class Samples:
    """How the answers of a row are sampled.

    Attributes:
        count: n, the number of answers per row.
    """

    count: int = 20
    temperature: float = 0.8

    def seed(self, row: int, number: int) -> int:
        """Return the seed of one answer: the same whenever and on whichever rank it is sampled."""
        digest = hashlib.sha256(f"{row} {number}".encode()).digest()
        return int.from_bytes(digest[:7])


def k_of(metric: str) -> int | None:
    """Return the k of ``pass@k``; None for another metric, and for a k that is not positive."""
    match = re.fullmatch(r"pass@([1-9]\d{0,5})", metric)
    return int(match[1]) if match else None


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Estimate pass@k without bias: the share of all choices of k answers of which one passes.

    Args:
        samples: n, at least k.
        passed: c, the number of these answers that pass.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} answers")
    return 1 - comb(samples - passed, k) / comb(samples, k)
