"""Which of many prompts go on, and which one to take: pure functions of their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import LOWER_IS_BETTER
from trainer.config.run import Halving

#: Ending of the names of scores that are the standard error of another.
STANDARD_ERROR = "_standard_error"
#: Ending of the loss of a distilled prompt where it is shown beside cross-entropies.
DIVERGENCE = "_KL_divergence"


def rungs(halving: Halving | None, last_step: int) -> frozenset[int]:
    """Steps before the last one at which prompts are compared: first, first * eta, ..."""

    def steps() -> Iterator[int]:
        step = halving.first if halving else last_step
        while halving and step < last_step:
            yield step
            step *= halving.eta

    return frozenset(steps())


def shown_scores(scores: Mapping[str, Any], objective: str | None = None) -> dict[str, Any]:
    """Scores as people are to read them: what is called a loss is a cross-entropy.

    Args:
        objective: of the prompt they are of; default: what stands among them, as in a summary.
    """
    if (objective or scores.get("objective")) != "distill":
        return dict(scores)
    return {
        key.removesuffix("_loss") + DIVERGENCE if key.endswith("_loss") else key: value
        for key, value in scores.items()
    }


def is_loss(key: str) -> bool:
    """Whether a score is in nats; others are shares."""
    return key.endswith(("loss", DIVERGENCE))


def worst(losses: Mapping[int, float], eta: int) -> list[int]:
    """Who is stopped at a rung: all but the ceil(n / eta) lowest losses of n, in order.

    A loss that is not finite is the worst; of equal ones the first stays. Source: successive
    halving, Algorithm 1 of arXiv 1810.05934 (which keeps floor(n / eta)).
    """
    stay = math.ceil(len(losses) / eta)
    ranked = sorted(losses, key=lambda k: (not math.isfinite(losses[k]), losses[k], k))
    return sorted(ranked[stay:])


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


def share_standard_error(share: float, rows: int) -> float:
    """Standard error of a share of rows, binomial.

    Of (hits + 1) / (rows + 2), Laplace's rule of succession: of 40 rows that are all right it is
    one row, not zero. F1, which is no share of rows, is taken for one.
    """
    smoothed = (share * rows + 1) / (rows + 2)
    return math.sqrt(smoothed * (1 - smoothed) / rows)


@dataclass(frozen=True)
class Candidate:
    """A trained prompt of a task: its length and the validation score of its saved adapter."""

    name: str
    num_virtual_tokens: int
    score: float
    standard_error: float


def select(candidates: Sequence[Candidate], metric: str) -> dict[str, Any] | None:
    """The shortest prompt within one standard error of the best; None if none has a score.

    Of equally short ones the better, of equally good ones the first. Source: the one-standard-error
    rule of Breiman et al., Classification and Regression Trees (1984), 3.4.3, for lengths of
    prompts in place of sizes of trees.

    Returns:
        ``prompt`` and ``score``, ``best`` and ``best_score``, ``standard_error`` of the best, and
        ``why`` in words.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1
    scored = [c for c in candidates if math.isfinite(c.score)]
    if not scored:
        return None
    best = min(scored, key=lambda c: (sign * c.score, c.num_virtual_tokens))
    error = best.standard_error if math.isfinite(best.standard_error) else 0.0
    near = [c for c in scored if sign * (c.score - best.score) <= error]
    chosen = min(near, key=lambda c: (c.num_virtual_tokens, sign * c.score))
    return {
        "prompt": chosen.name,
        "metric": metric,
        "score": chosen.score,
        "best": best.name,
        "best_score": best.score,
        "standard_error": error,
        "why": _why(chosen, best, error, metric, len(scored)),
    }


def _why(chosen: Candidate, best: Candidate, error: float, metric: str, count: int) -> str:
    tokens = f"{chosen.num_virtual_tokens} virtual tokens"
    what = f"validation {metric.replace('_', ' ')}"
    if count == 1:
        return f"the only prompt: {what} {chosen.score:.4f} with {tokens}"
    if chosen is best:
        return (
            f"the best {what} ({best.score:.4f}), and no shorter prompt than its {tokens} comes "
            f"within one standard error ({error:.4f})"
        )
    return (
        f"the shortest ({tokens}) within one standard error ({error:.4f}) of the best, "
        f"{best.name} ({best.num_virtual_tokens} virtual tokens): {what} {chosen.score:.4f} "
        f"against {best.score:.4f}"
    )
