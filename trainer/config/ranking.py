"""Ranking of the prompts and baselines of a task.

They are ranked by the task's metric on the validation rows, then by validation loss, by number of
virtual tokens, and by order in the run file. A score that is not finite ranks last. Checkpoints,
early stopping, halving, selection and all tables use this ranking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.config import LOWER_IS_BETTER

#: Sort key of one set of validation scores, (metric, loss): smaller is better.
ScoreKey = tuple[float, float]
#: The key of scores that are missing or not finite.
LAST: ScoreKey = (math.inf, math.inf)


def score_key(scores: Mapping[str, Any], metric: str) -> ScoreKey:
    """Return the sort key: ``validation_<metric>``, then ``validation_loss`` if known."""
    value, loss = scores.get(f"validation_{metric}"), scores.get("validation_loss")
    if value is None or not all(math.isfinite(x) for x in (value, loss) if x is not None):
        return LAST
    return (
        value if metric in LOWER_IS_BETTER else -value,
        math.inf if loss is None else loss,
    )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A prompt or a baseline of a task, with its sort criteria.

    Attributes:
        scores: validation scores; of a prompt, those of its best step.
        num_virtual_tokens: 0 for a baseline.
        teacher: text of the teacher of a distilled prompt, whose loss is the divergence from that
            teacher. None: the loss is the cross-entropy of the labels.
        eliminated: stopped by halving.
        diverged: stopped because its updates were not finite.
    """

    name: str
    scores: Mapping[str, Any]
    num_virtual_tokens: int = 0
    teacher: str | None = None
    eliminated: bool = False
    diverged: bool = False


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def rank(entries: Sequence[AnyEntry], metric: str) -> list[AnyEntry]:
    """Sort entries from best to worst, without diverged ones and those without finite scores.

    Prompts that halving has eliminated come after all others. A cross-entropy and a divergence from
    a teacher are not comparable, nor are divergences from two teachers. If the entries have losses
    of several kinds, ties are not broken by loss, and with metric ``loss`` only the entries with a
    cross-entropy are ranked.

    Args:
        entries: in the order of the run file.
    """
    ranked = [e for e in entries if not e.diverged and score_key(e.scores, metric) != LAST]
    if metric in LOWER_IS_BETTER and len({e.teacher for e in ranked}) > 1:
        ranked = [e for e in ranked if e.teacher is None]
    comparable = len({e.teacher for e in ranked}) <= 1

    def key(entry: AnyEntry) -> tuple[bool, float, float, int]:
        value, loss = score_key(entry.scores, metric)
        return entry.eliminated, value, loss if comparable else 0.0, entry.num_virtual_tokens

    return sorted(ranked, key=key)  # stable: the order of the run file breaks ties
