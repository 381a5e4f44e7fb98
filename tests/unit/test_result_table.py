"""The rows that terminal, report and MLflow show, and which prompt of a run is selected."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.run_folder import small_config
from trainer.evaluation.prediction_files import TEACHER
from trainer.evaluation.score_format import (
    column_title,
    format_difference,
    format_score,
    score_interval,
)
from trainer.reporting.result_table import task_tables
from trainer.reporting.run_results import selection
from trainer.reporting.summary import RunSummary

ROWS = {"validation": 60}


def prompt(name: str, accuracy: float, loss: float, tokens: int, **more: Any) -> dict[str, Any]:
    scores = {"validation_accuracy": accuracy, "validation_loss": loss}
    return {"name": name, "num_virtual_tokens": tokens, **scores, **more}


def stopped(reason: str, step: int = 10) -> dict[str, Any]:
    return {"stopped": {"reason": reason, "step": step}}


def table(prompts: list[dict[str, Any]], metric: str = "accuracy", **results: Any) -> Any:
    """The table of one task with these prompts, each with settings and results in one mapping."""
    settings = ("name", "num_virtual_tokens", "objective", "teacher")
    config = small_config(metric, [{k: p[k] for k in settings if k in p} for p in prompts])
    summary = RunSummary.model_validate(
        {
            "status": "finished",
            "tasks": {"t": {"rows": ROWS, **results}},
            "prompts": {p["name"]: p for p in prompts},
        }
    )
    (task_table,) = task_tables(config, summary)
    return task_table


def test_selected_and_best_are_one_and_the_shorter_prompt_is_advice():
    prompts = [
        prompt("tie", 0.9, 0.8, 20),
        prompt("eliminated", 0.95, 0.1, 20, **stopped("halving")),
        prompt("long", 0.9, 0.2, 20),
        prompt("short", 0.88, 0.3, 5),
        prompt("diverged", 1.0, 0.1, 1, **stopped("diverged")),
    ]
    rendered = table(prompts)
    assert [row.name for row in rendered.prompts if row.best] == ["long"]
    assert [row.name for row in rendered.prompts] == [
        "long",
        "tie",
        "short",
        "eliminated",
        "diverged",
    ]
    choice = selection(rendered)
    assert choice is not None
    assert choice.model_dump() == {
        "prompt": "long",
        "metric": "accuracy",
        "score": 0.9,
        "num_virtual_tokens": 20,
        "why": "best of 5 prompts: validation accuracy 90.0% (79.9–95.3); tie has the same "
        "accuracy",
        "shorter": {"prompt": "short", "score": 0.88, "num_virtual_tokens": 5},
    }
    out = [p | stopped("halving") for p in prompts[:3]]
    choice = selection(table(out))
    assert choice is not None
    assert choice.prompt == "eliminated"
    assert "halving eliminated it, but no other prompt is left" in choice.why
    assert selection(table([prompt("p", float("nan"), 1.0, 5)])) is None


def test_divergences_from_teachers_are_not_compared_with_losses():
    labels = prompt("labels", 0, 1.0, 4)
    taught = prompt("taught", 0, 0.1, 4, objective="distill", teacher="one")
    other = prompt("other", 0, 0.01, 4, objective="distill", teacher="two")
    baselines = {
        "no_prompt": {"validation_loss": 3.0},
        "untaught": {"taught": {"validation_loss": 2.0}, "other": {"validation_loss": 2.5}},
    }

    def best(*prompts: dict[str, Any]) -> list[str]:
        return [row.name for row in table([*prompts], "loss", **baselines).rows if row.best]

    assert best(labels, taught) == ["no_prompt", "labels"]
    assert best(taught) == ["no_prompt-taught", "taught"]
    assert best(taught, other) == ["no_prompt"]
    assert "different teachers" in table([taught, other], "loss", **baselines).verdict
    teachers = [{"text": "Say\n which.", "prompts": ["taught"], "validation_loss": 0.5}]
    rendered = table([labels, taught], "loss", **baselines, teachers=teachers)
    (teacher,) = [row for row in rendered.baselines if row.kind == TEACHER]
    assert teacher.label == "teacher of taught: “Say which.”"
    assert rendered.cell(teacher, "validation_loss") == "0.5000"
    assert teacher.best
    assert rendered.cell(teacher, "validation_KL_divergence") == "–"
    rendered = table([taught], "loss", **baselines)
    assert rendered.cell(rendered.prompts[0], "validation_KL_divergence") == "0.1000"
    assert rendered.cell(rendered.prompts[0], "validation_loss") == "–"


@pytest.mark.parametrize(
    ("key", "scores", "expected"),
    [
        ("validation_accuracy", {"validation_accuracy": 0.5}, (0.37735, 0.62265)),
        ("validation_accuracy", {"validation_accuracy": 1.0}, (0.9398, 1.0)),
        ("shifted_validation_accuracy", {"shifted_validation_accuracy": 0.5}, None),
        ("validation_loss", {"validation_loss": 1.0}, None),
        (
            "validation_loss",
            {"validation_loss": 1.0, "validation_loss_standard_error": 0.1},
            (0.8040, 1.1960),
        ),
        ("validation_f1", {"validation_f1": 0.99, "validation_f1_standard_error": 0.1}, (0.794, 1)),
    ],
)
def test_intervals(key, scores, expected):
    interval = score_interval(scores, key, ROWS)
    assert interval == (None if expected is None else pytest.approx(expected, abs=5e-5))


def test_numbers_and_columns_in_words():
    assert format_score("validation_accuracy", 0.6833) == "68.3%"
    assert format_score("validation_loss", 0.68333) == "0.6833"
    assert format_score("validation_loss", float("nan")) == "not finite"
    assert format_score("validation_loss", None) == "–"
    assert column_title("shifted_validation_macro_f1") == "OOD macro F1"
    assert column_title("validation_KL_divergence") == "KL divergence"


@pytest.mark.parametrize(("key", "zero"), [("validation_accuracy", "+0.0"), ("loss", "+0.0000")])
def test_a_difference_that_rounds_to_zero_is_not_negative(key: str, zero: str) -> None:
    assert format_difference(key, -1e-6) == zero
