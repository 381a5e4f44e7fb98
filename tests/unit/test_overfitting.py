"""The verdict on overfitting: train rows, lengths, shifted rows and seeds, in words and numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_folder import small_config
from trainer.evaluation.prediction_files import path_of, train_file
from trainer.reporting.overfitting import assess
from trainer.reporting.result_table import task_tables
from trainer.reporting.run_results import selection
from trainer.reporting.summary import Overfitting, RunSummary

ROWS = 100


def write(folder: Path, name: str, right: int) -> None:
    """Predictions of ``ROWS`` rows, of which the first ``right`` are correct."""
    path = path_of(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [
        {"row": row, "correct": row < right, "loss": 1.2 - (row < right), "tokens": 1}
        for row in range(ROWS)
    ]
    lines = map(json.dumps, records)
    path.write_text("\n".join(lines) + "\n")


def assessed(
    folder: Path,
    prompts: dict[str, dict[str, Any]],
    train: dict[str, int] | None = None,
    metric: str = "accuracy",
    **task: Any,
) -> Overfitting:
    """Assess prompts of which so many of the ``ROWS`` validation and train rows are correct."""
    results, settings = {}, []
    for name, prompt in prompts.items():
        right = prompt.pop("right")
        shifted, stopped = prompt.pop("shifted", None), prompt.pop("stopped", None)
        settings.append({"name": name, **prompt})
        results[name] = {"validation_accuracy": right / ROWS, "stopped": stopped}
        results[name] |= {"validation_loss": 1.2 - right / ROWS}
        results[name] |= {"validation_loss_standard_error": 0.05}
        if shifted is not None:
            results[name]["shifted_validation_accuracy"] = shifted / ROWS
        write(folder, name, right)
    for name, right in (train or {}).items():
        write(folder, train_file(name), right)
    config = small_config(metric, settings)
    rows = {"validation": ROWS, "shifted_validation": ROWS}
    summary = RunSummary.model_validate(
        {"status": "finished", "prompts": results, "tasks": {"t": {"rows": rows, **task}}}
    )
    (table,) = task_tables(config, summary)
    overfitting = assess(folder, config, table, selection(table))
    assert overfitting is not None
    return overfitting


def words_of(result: Overfitting) -> str:
    return " ".join(result.verdict)


def lengths(long: int, short: int, **more: int) -> dict[str, dict[str, Any]]:
    return {
        "long": {"num_virtual_tokens": 20, "right": long, **more},
        "short": {"num_virtual_tokens": 5, "right": short, **more},
    }


def test_a_longer_prompt_that_only_fits_the_train_rows_better_is_not_taken(tmp_path):
    result = assessed(tmp_path, lengths(72, 70), {"long": 96, "short": 80})
    assert result.take == "short"
    assert words_of(result).startswith(
        "20 virtual tokens (long) fit the train rows better than 5 (short): +16.0 points (95% "
        "interval "
    )
    assert (
        "On the validation rows they are not significantly better: +2.0 points (95% interval "
    ) in words_of(result)
    assert "Of these two, take 5 (short)." in words_of(result)
    assert "it fits its train rows better than new rows" in words_of(result)
    assert result.train is not None
    assert result.train.gap is not None
    assert result.train.gap.difference == pytest.approx(-0.24)
    assert result.train.gap.p_value < 0.001


def test_a_longer_prompt_that_generalizes_better_is_taken(tmp_path):
    result = assessed(tmp_path, lengths(80, 50), {"long": 82, "short": 50})
    assert result.take == "long"
    assert "On the validation rows they are better: +30.0 points" in words_of(result)
    assert "Of these two, take 20 (long)." in words_of(result)
    assert "no significant overfitting to the train rows" in words_of(result)


def test_the_difference_is_told_from_the_view_of_the_longer_prompt(tmp_path):
    """The best prompt is the shorter one: the signs are turned."""
    result = assessed(tmp_path, lengths(60, 80), {"long": 95, "short": 80})
    assert (result.prompt, result.other, result.take) == ("short", "long", "short")
    assert "(long) fit the train rows better than 5 (short): +15.0 points" in words_of(result)
    assert "they are worse: -20.0 points" in words_of(result)
    assert result.length is not None
    assert result.length.difference == pytest.approx(0.2)


def test_without_scores_of_train_rows_lengths_are_compared_on_validation_rows(tmp_path):
    result = assessed(tmp_path, lengths(72, 70))
    assert result.train is None
    assert words_of(result).startswith(
        "20 virtual tokens (long) are not significantly better than 5 (short) on the validation "
        "rows: +2.0 points"
    )


def test_a_shorter_prompt_may_be_worse_by_a_standard_error_without_significance(tmp_path):
    result = assessed(tmp_path, lengths(74, 69), {"long": 80, "short": 79})
    assert "fit 100 train rows no better than 5 (short): +1.0 points" in words_of(result)
    assert (
        "Of these two, take 20 (long): the shorter one is worse by more than one standard error."
    ) in words_of(result)


@pytest.mark.parametrize(
    ("better", "also_better", "take"),
    [
        (True, ["short"], "short"),
        (True, [], "long"),
        (False, ["middle"], "middle"),
        (False, [], "short"),
    ],
)
def test_the_prompt_to_take_beats_the_best_baseline_if_any_does(
    tmp_path, better, also_better, take
):
    compared = {"baseline": "no_prompt", "prompt": "long", "rows": ROWS, "test": "McNemar exact"}
    compared |= {"difference": 0.1, "low": 0.0, "high": 0.2, "p_value": 0.04}
    compared |= {"detectable_difference": 0.1, "better": better, "also_better": also_better}
    prompts = lengths(74, 73) | {"middle": {"num_virtual_tokens": 10, "right": 40}}
    result = assessed(tmp_path, prompts, comparison=compared)
    assert result.take == take
    reason = {
        "short": "Of these two, take 5 (short).",
        "long": "take 20 (long): the shorter one is not significantly better than the best "
        "baseline.",
    }
    assert reason.get(take, "") in words_of(result)
    assert ("Of these two" in words_of(result)) == (take != "middle")


def test_a_shorter_prompt_that_halving_eliminated_is_not_called_worse(tmp_path):
    prompts = lengths(74, 73)
    prompts["short"]["stopped"] = {"step": 1, "reason": "halving"}
    result = assessed(tmp_path, prompts)
    assert "take 20 (long): the shorter one was eliminated by halving." in words_of(result)


@pytest.mark.parametrize(
    ("shifted", "words"),
    [
        (70, "difference -2.0 points (95% interval -14.4 to +10.5): no significant change"),
        (40, "significantly worse"),
        (95, "significantly better"),
    ],
)
def test_the_score_on_shifted_rows_is_compared_with_that_of_the_best_baseline(
    tmp_path, shifted, words
):
    no_prompt = {"validation_accuracy": 0.5, "shifted_validation_accuracy": 0.45}
    prompts = {"p": {"right": 72, "shifted": shifted}}
    result = assessed(tmp_path, prompts, no_prompt=no_prompt)
    assert words in words_of(result)
    assert words_of(result).endswith("; the best baseline there: -5.0 points.")


def test_the_spread_between_seeds_is_that_of_prompts_with_equal_settings(tmp_path):
    rights = {("a", 0): 70, ("a", 1): 74, ("b", 0): 60, ("b", 1): 62, ("alone", 0): 90}
    settings = {"a": 0.01, "b": 0.02, "alone": 0.03}
    prompts = {
        f"{name}-{seed}": {"right": right, "seed": seed, "learning_rate": settings[name]}
        for (name, seed), right in rights.items()
    }
    result = assessed(tmp_path, prompts)
    seeds = result.seeds
    assert seeds is not None
    assert (seeds.prompt, seeds.seeds, seeds.low, seeds.high) == ("a-1", 2, 0.70, 0.74)
    assert seeds.standard_deviation == pytest.approx(math.sqrt((8 + 2) / 2) / 100)
    points = 1.96 * math.sqrt(2 * (8 + 2) / 2)  # two runs, each with this deviation
    assert f"a score can change by about {points:.1f} points." in words_of(result)


def test_seeds_with_equal_scores_do_not_show_how_much_a_score_can_change(tmp_path):
    prompts = {f"a-{seed}": {"right": 70, "seed": seed} for seed in (0, 1)}
    words = words_of(assessed(tmp_path, prompts))
    assert words.endswith("All 2 seeds of a-0 score 70.0%.")


def test_the_summary_keeps_the_verdict(tmp_path):
    result = assessed(tmp_path, lengths(72, 70), {"long": 96, "short": 80})
    summary = RunSummary(status="finished", overfitting={"t": result})
    again = RunSummary.model_validate_json(summary.model_dump_json())
    assert again == summary
    config = small_config("accuracy", [{"name": "p"}])
    (table,) = task_tables(config, again)
    assert table.overfitting == result
    assert replace(table, overfitting=None).advice == table.advice == ""
