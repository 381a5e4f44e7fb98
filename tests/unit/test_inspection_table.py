"""The tables of an inspection: numbers of a column have equal decimals, and what pruning did."""

from __future__ import annotations

import math

from trainer.commands.inspect_prompts.table import checkpoint_table, effect_table, pruned_text
from trainer.reporting.inspection import PromptInspection, PrunedPrompt, TokenInspection


def token(index: int, effect: float, half: float, gradient: float) -> TokenInspection:
    values = {
        "index": index,
        "leave_one_out": effect,
        "leave_one_out_low": effect - half,
        "leave_one_out_high": effect + half,
        "gradient_times_input": gradient,
    }
    return TokenInspection.model_validate(values)


def columns_of(tokens: list[TokenInspection]) -> tuple[list[str], list[str]]:
    names, rows = effect_table(tokens)
    effect, gradient = names.index("left out"), names.index("grad x input")
    return [row[effect] for row in rows], [row[gradient] for row in rows]


def test_small_effects_are_legible_beside_large_ones() -> None:
    effects, gradients = columns_of([token(0, 0.0527, 0.0363, 2e-4), token(1, 1e-4, 3e-5, -9e-6)])
    assert effects == ["+0.05270 ±0.03630", "+0.00010 ±0.00003"]
    assert gradients == ["+0.0002000", "-0.0000090"]
    effects, gradients = columns_of([token(0, 0.5, 0.1, -0.2), token(1, 0.0, 0.0, 0.0)])
    assert effects == ["+0.5000 ±0.1000", "+0.0000 ±0.0000"]
    assert gradients == ["-0.2000", "+0.0000"]
    effects, _ = columns_of([token(0, math.inf, math.nan, 0.0)])
    assert effects == ["+inf ±nan"]


def pruned(low: float) -> PrunedPrompt:
    return PrunedPrompt(
        dropped=[1],
        num_virtual_tokens=3,
        rows=20,
        chosen_on=20,
        loss_before=0.07,
        loss=0.11,
        difference=0.04,
        difference_low=low,
        difference_high=0.07,
        adapter="out",
    )


def test_a_pruned_prompt_that_is_worse_on_other_rows_is_not_recommended() -> None:
    assert "significantly worse there: keep the full one" in pruned_text("a", pruned(0.01))
    assert "No significant loss there" in pruned_text("a", pruned(-0.01))


def test_a_long_elicited_text_is_cut_at_its_end() -> None:
    prompt = PromptInspection.model_validate(
        {
            "task": "t",
            "rows": 4,
            "tokens": [],
            "checkpoints": [{"step": 3, "loss": 0.1, "elicited": "word " * 20 + "sum(x)"}],
        }
    )
    _, (row,) = checkpoint_table(prompt)
    assert row[1].endswith("…")
