"""Files of predictions: what they hold, how they are bounded, and comparisons from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.run_folder import small_config
from tests.unit.test_evaluation import load
from trainer.evaluation import prediction_records
from trainer.evaluation.baselines import add_majority, majority_scores, score_answer
from trainer.evaluation.prediction_files import baseline_file, outcomes, path_of, read
from trainer.evaluation.prediction_records import Predictions, answer_columns, scored_columns
from trainer.evaluation.scoring import Scored
from trainer.reporting.comparison import compare
from trainer.reporting.result_table import TaskTable, task_tables
from trainer.reporting.summary import Comparison, RunSummary

LABELLED = {"input": "{text}", "target": " {label}", "choices": ["c", "d"], "metric": "accuracy"}


def labelled(folder: Path, labels: str, **task: Any) -> Any:
    rows = [{"text": f"a {'b' * (i % 3)}", "label": label} for i, label in enumerate(labels)]
    return load(folder, rows, **{**LABELLED, **task})


def keep(folder: Path, rows: Any, columns: Any, name: str = "p", step: int = 3) -> list[Any]:
    Predictions(folder, pytest.fail).keep(name, step, rows, columns)
    return list(read(path_of(folder, name)))


def test_choices(tmp_path):
    rows = labelled(tmp_path, "cdc").evaluation["validation"]
    nll_RC = torch.tensor([[1.0, 2.0], [0.5, 3.0], [math.nan, 1.0]], dtype=torch.float64)
    first, second, third = keep(
        tmp_path, rows, scored_columns(rows, Scored({}, nll_RC, [1.0, 3.0, math.nan]))
    )
    assert first["probabilities"]["c"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    first.pop("probabilities")
    assert first == {
        "step": 3,
        "row": 1,
        "place": f"{tmp_path}/rows.jsonl:1",
        "input": "a ",
        "target": "c",
        "prediction": "c",
        "correct": True,
        "scores": {"c": -1.0, "d": -2.0},
        "loss": 1.0,
        "tokens": rows.label_counts[0],
    }
    assert (second["target"], second["prediction"], second["correct"]) == ("d", "c", False)
    assert second["loss"] == 3.0, "of the right choice"
    assert third["scores"]["c"] is None, "JSON has no NaN"
    shown = third["target"], third["prediction"], third["correct"]
    assert shown == ("c", None, False), "NaN predicts nothing"


def test_generated_texts_sets_of_labels_and_divergences(tmp_path):
    task = {"metric": "exact_match", "choices": None}
    rows = labelled(tmp_path, "cd", **task).evaluation["validation"]
    scored = Scored({}, None, [1.0, 2.0], ["c", "<b>x</b>"], ["c", "d"], [True, False])
    comparison = keep(tmp_path, rows, scored_columns(rows, scored))
    shown = [(r["target"], r["prediction"], r["correct"], r["loss"]) for r in comparison]
    assert shown == [("c", "c", True, 1.0), ("d", "<b>x</b>", False, 2.0)]

    sets = {"target": " {labels}", "choices": ["c", "d"], "multi_label": True, "metric": "f1"}
    data = load(
        tmp_path, [{"text": "a", "labels": ["d", "c"]}, {"text": "b", "labels": ["c"]}],
        input="{text}", **sets,
    )  # fmt: skip
    rows = data.evaluation["validation"]
    scored = Scored({}, None, None, ["c", "c, x"], ["c, d", "c"], [False, False])
    comparison = keep(tmp_path, rows, scored_columns(rows, scored))
    assert [(r["target"], r["prediction"]) for r in comparison] == [
        (["c", "d"], ["c"]),
        (["c"], ["c", "x"]),
    ]
    of_f1 = outcomes(comparison, "f1")
    assert of_f1 is not None
    assert sum(of_f1.sums) / sum(of_f1.counts) == pytest.approx(2 * 2 / (3 + 3))
    majority = majority_scores(data)
    assert majority["answer"] in ("c, d", "c")
    assert majority["validation_f1_standard_error"] > 0
    exact = replace(rows, task=rows.task.model_copy(update={"metric": "exact_match"}))
    assert score_answer(exact, "c") == {"exact_match": 0.5}, "only what prompts are scored by"
    comparison = keep(tmp_path, rows, answer_columns(rows, "c"))
    assert [r["f1_terms"] for r in comparison] == [[2.0, 3], [2.0, 2]]

    rows = labelled(tmp_path, "cd", metric="loss", choices=None).evaluation["validation"]
    teacher_R2 = torch.tensor([[0.5, 1.0], [0.25, 0.0]])
    comparison = keep(tmp_path, rows, scored_columns(rows, Scored({}, teacher_R2=teacher_R2)))
    assert [(r["loss"], r["agreement"]) for r in comparison] == [(0.5, 1.0), (0.25, 0.0)]
    of_loss = outcomes(comparison, "loss")
    assert of_loss is not None
    assert (of_loss.sums, of_loss.counts) == ([0.5, 0.25], list(map(float, rows.label_counts)))


def test_dialogues_and_token_ids(tmp_path):
    parts = [{"type": "text", "text": "a"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 0}]
    data = load(tmp_path, [{"messages": turns}], messages="messages")
    rows = data.evaluation["validation"]
    (comparison,) = keep(tmp_path, rows, scored_columns(rows, Scored({}, nll_R=[1.5])))
    assert (comparison["input"], comparison["target"], comparison["loss"]) == ("user: a", "b", 1.5)
    data = load(tmp_path, [{"input_ids": [3, 4], "labels": [-100, 4]}], tokens={})
    rows = data.evaluation["validation"]
    (comparison,) = keep(tmp_path, rows, scored_columns(rows, Scored({}, nll_R=[1.5])))
    assert (comparison["input"], comparison["tokens"]) == ("[3, 4]", 1)


def test_rows_after_the_limit_have_no_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_records, "MAX_TEXTS", 2)
    monkeypatch.setattr(prediction_records, "MAX_CHARACTERS", 1)
    rows = labelled(tmp_path, "cdc").evaluation["validation"]
    comparison = keep(tmp_path, rows, scored_columns(rows, Scored({}, torch.ones(3, 2), [1.0] * 3)))
    assert comparison[1]["input"] == "a … [3 characters]"
    assert comparison[2] == {
        "step": 3, "row": 3, "target": "c", "prediction": "c", "correct": True, "loss": 1.0,
        "tokens": rows.label_counts[2],
    }  # fmt: skip
    assert outcomes(comparison, "accuracy") is not None


def test_files_that_are_missing_or_of_another_step_are_found(tmp_path):
    rows = labelled(tmp_path, "c").evaluation["validation"]
    kept = Predictions(tmp_path, pytest.fail)
    kept.keep("p", 3, rows, scored_columns(rows, Scored({}, torch.ones(1, 2))))
    path_of(tmp_path, "damaged").write_text("{")
    assert kept.missing({"p": 3}) == []
    assert kept.missing({"p": 2, "q": 1, "damaged": 1}) == ["p", "q", "damaged"]
    kept.clear()
    assert kept.missing({"p": 3}) == ["p"]


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    rows = labelled(tmp_path, "c").evaluation["validation"]
    warnings: list[str] = []
    (tmp_path / "predictions").write_text("in the way")
    Predictions(tmp_path, warnings.append).keep(
        "p", 3, rows, scored_columns(rows, Scored({}, torch.ones(1, 2)))
    )
    assert len(warnings) == 1
    assert "predictions not written" in warnings[0]


def test_the_majority_class_is_that_of_the_train_rows(tmp_path):
    data = labelled(tmp_path, "dcd")
    majority = majority_scores(data)
    assert (majority["answer"], majority["train_share"]) == ("d", pytest.approx(2 / 3))
    assert majority["validation_accuracy"] == pytest.approx(2 / 3)
    assert majority["validation_macro_f1"] == pytest.approx((2 * 2 / (3 + 2) + 0) / 2)
    assert majority_scores(labelled(tmp_path, "dc"))["answer"] == "c", "of equal ones the first"
    exact = majority_scores(labelled(tmp_path, "dcd", metric="exact_match"))
    assert exact["validation_exact_match"] == exact["validation_accuracy"]
    baselines: dict[str, Any] = {"t": {}}
    add_majority({"t": data}, baselines, Predictions(tmp_path, pytest.fail))
    assert baselines["t"]["majority"] == majority
    predictions = list(read(path_of(tmp_path, baseline_file("t", "majority"))))
    assert [r["correct"] for r in predictions] == [True, False, True]


def compared(
    folder: Path, prompts: dict[str, str], baseline: str
) -> tuple[Comparison | None, TaskTable]:
    """The comparison of prompts with a baseline; texts say which rows are right, ``1`` or ``0``."""
    arms = {**prompts, baseline_file("t", "no_prompt"): baseline}
    for name, right in arms.items():
        path = path_of(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"row": i, "correct": r == "1"} for i, r in enumerate(right, 1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def scores(right: str) -> dict[str, float]:
        return {"validation_accuracy": right.count("1") / len(right)}

    config = small_config("accuracy", [{"name": name, "num_virtual_tokens": 1} for name in prompts])
    task = {"no_prompt": scores(baseline), "rows": {"validation": len(baseline)}}
    summary = RunSummary.model_validate(
        {
            "status": "finished",
            "tasks": {"t": task},
            "prompts": {name: scores(right) for name, right in prompts.items()},
        }
    )
    (table,) = task_tables(config, summary)
    comparison = compare(folder, table)
    return comparison, replace(table, comparison=comparison)


def test_the_verdict_states_that_no_prompt_beats_the_best_baseline(tmp_path):
    comparison, table = compared(tmp_path, {"p": "1" * 41 + "0" * 19}, "0" * 16 + "1" * 44)
    assert comparison
    assert (comparison.better, comparison.difference) == (False, pytest.approx(-3 / 60))
    assert table.verdict == (
        "None of the prompts beats the best baseline (no prompt: 73.3%) significantly on 60 "
        "validation rows: best prompt p (68.3%), difference -5.0 points (95% interval -24.7 to "
        "+15.6; McNemar exact, p = 0.736). 60 rows can show a difference of about 27.1 points or "
        "more."
    )


def test_the_verdict_states_that_a_prompt_beats_the_best_baseline(tmp_path):
    prompts = {"p": "1" * 50 + "0" * 10, "q": "1" * 20 + "0" * 40}
    comparison, table = compared(tmp_path, prompts, "1" * 20 + "0" * 40)
    assert comparison
    assert comparison.better
    assert table.verdict.startswith(
        "Prompt p (83.3%) beats the best baseline (no prompt: 33.3%) significantly on 60 "
        "validation rows: difference +50.0 points (95% interval "
    )
    assert table.verdict.endswith(
        "best of 2 prompts on the same rows: the difference is optimistic."
    )


def test_a_prompt_other_than_the_best_may_be_significantly_better(tmp_path):
    baseline = "1" * 30 + "0" * 30
    prompts = {"noisy": "0" * 12 + "1" * 18 + "1" * 20 + "0" * 10, "calm": "1" * 37 + "0" * 23}
    comparison, table = compared(tmp_path, prompts, baseline)
    assert comparison
    assert (comparison.prompt, comparison.better, comparison.also_better) == (
        "noisy",
        False,
        ["calm"],
    )
    assert table.verdict.startswith("The best prompt does not beat the best baseline")
    assert "Significantly better, each tested alone: calm." in table.verdict


def test_rows_that_differ_are_not_compared(tmp_path):
    comparison, table = compared(tmp_path, {"p": "110"}, "10")
    assert comparison is None
    assert table.verdict.endswith("no paired test was possible.")
