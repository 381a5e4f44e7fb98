"""Describe in words whether a task's prompts beat the best baseline."""

from __future__ import annotations

from trainer.evaluation.score_format import format_difference, is_loss
from trainer.reporting.summary import Comparison


def describe_comparison(
    comparison: Comparison, column: str, score: str, against: str, num_prompts: int
) -> str:
    """Describe a paired comparison in one to three sentences.

    ``score`` and ``against`` are the best prompt and the best baseline with their scores, as text.
    """
    rows, p_value = f"{comparison.rows:,}", comparison.p_value
    unit = "" if is_loss(column) else " points"
    difference, low, high = (
        format_difference(column, value)
        for value in (comparison.difference, comparison.low, comparison.high)
    )
    numbers = (
        f"difference {difference}{unit} (95% interval {low} to {high}; {comparison.test}, "
        f"p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'})"
    )
    if comparison.better:
        text = (
            f"Prompt {score} beats the best baseline ({against}) significantly on {rows} "
            f"validation rows: {numbers}."
        )
        if num_prompts > 1:
            text += (
                f" This is the best of {num_prompts} prompts on the same rows: the difference is "
                "optimistic."
            )
        return text
    also = ", ".join(comparison.also_better)
    subject = "The best prompt does not beat" if also else "None of the prompts beats"
    text = (
        f"{subject} the best baseline ({against}) significantly on {rows} validation rows: best "
        f"prompt {score}, {numbers}."
    )
    if also:
        text += f" Significantly better, each tested alone: {also}."
    if not is_loss(column) and comparison.detectable_difference > 1:
        return f"{text} {rows} rows are too few for any significant difference."
    detectable = format_difference(column, comparison.detectable_difference).lstrip("+")
    return f"{text} {rows} rows can show a difference of about {detectable}{unit} or more."
