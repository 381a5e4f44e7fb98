"""Records of all texts -> effects of rewrites, paired by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.commands.evaluate.results import finite
from trainer.commands.lint.selection import Checked
from trainer.config import Task
from trainer.evaluation.lint.results import CheckedText, Effect, unmeasured
from trainer.evaluation.lint.rewrites import Rewrites
from trainer.evaluation.metric_sums import paired_difference, row_sums

Records = Sequence[Mapping[str, Any]]


def measured(
    checked: Checked, texts: Rewrites, records: Callable[[str], Records], task: Task, metric: str
) -> CheckedText:
    """Compare every rewritten text with the original.

    Args:
        records: returns the predictions with a text; of all texts, for the same rows.
        task: whose rows these are.
    """
    original = row_sums(metric, task, records(texts.original))

    def effect(text: str | None) -> Effect | None:
        if text is None:
            return None
        sums = row_sums(metric, task, records(text))
        if not (math.isfinite(sums.score) and math.isfinite(original.score)):
            return None
        result = paired_difference(metric, sums, original)
        return Effect(
            difference=finite(result.difference),
            low=finite(result.low),
            high=finite(result.high),
            p_value=finite(result.p_value),
            detectable_difference=finite(result.detectable_difference),
            score=finite(sums.score),
        )

    plain = unmeasured(checked.instruction, checked.findings)
    findings = [
        part.model_copy(update={"effect": effect(text)})
        for part, text in zip(plain.findings, texts.by_finding, strict=True)
    ]
    by_rule = {rule: effect(text) for rule, text in texts.by_rule.items()}
    return plain.model_copy(
        update={
            "findings": findings,
            "metric": metric,
            "rows": len(original.values_RC),
            "score": finite(original.score),
            "rules": {rule: value for rule, value in by_rule.items() if value is not None},
            "rewritten": texts.together,
            "rewritten_effect": effect(texts.together),
        }
    )
