"""From records to ``evaluation.json`` and the table."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit import run_folder
from tests.unit.test_evaluate_arms import CHOICES, build, make_run
from trainer.commands.evaluate.arms import _unique
from trainer.commands.evaluate.costs import BaseCost, paid_after, query_cost, training_flops
from trainer.commands.evaluate.results import TaskResults
from trainer.commands.evaluate.table import _fit, show
from trainer.evaluation.statistics import paired_rates
from trainer.reporting.evaluation import (
    EVALUATION_FILE,
    Evaluation,
    TaskEvaluation,
    cells,
    label,
    remarks,
    titles,
)
from trainer.reporting.html import write_report
from trainer.reporting.markdown_text import markdown
from trainer.reporting.mlflow_note import read_results
from trainer.reporting.summary import RunSummary
from trainer.runtime.console import Console
from trainer.tracking.run_metadata import MAX_TAG

COST = BaseCost(weights=1000, head=100, attention_width=10, vocab_size=50)
SUMMARY = RunSummary.model_validate(
    {
        "status": "finished",
        "prompts": {"soft": {}, "other": {}},
        "throughput": {"useful_tokens": 500, "train_seconds": 8.0},
    }
)


def records(correct: str) -> list[dict[str, Any]]:
    """One record per character: ``1`` is correct."""
    made = []
    for number, mark in enumerate(correct):
        gold = CHOICES[number % 3]
        predicted = gold if mark == "1" else CHOICES[(number + 1) % 3]
        shares = {choice: 0.8 if choice == predicted else 0.1 for choice in CHOICES}
        made.append(
            {
                "row": number + 1,
                "target": gold,
                "prediction": predicted,
                "correct": mark == "1",
                "probabilities": shares,
                "loss": 1.0,
                "tokens": 2,
            }
        )
    return made


def results(folder: Path, scores: dict[str, str], **settings: Any) -> TaskEvaluation:
    """Results of arms with these correct rows: ``soft`` and ``soft-2`` are trained prompts."""
    arms = [arm for arm in build(folder, make_run(folder))[0] if arm.name in scores]
    soft = next(arm for arm in arms if arm.kind == "prompt")
    arms += [replace(soft, name=name) for name in scores if name.startswith("soft-")]
    values = {"metric": "accuracy", "select_on": "all", "base": COST, "summary": SUMMARY}
    of_arms = {name: records(correct) for name, correct in scores.items()}
    return TaskResults(arms, of_arms, **(values | settings)).evaluation()


def test_arms_are_compared_with_the_best_prompt(tmp_path: Path) -> None:
    scores = {"no_prompt": "1000", "hand_written-1": "1010", "soft": "1101", "soft-2": "1111"}
    task = results(tmp_path, scores)
    assert (task.rows, task.metric, task.best) == (4, "accuracy", "soft-2")
    assert [(arm.name, arm.score) for arm in task.arms] == [
        ("no_prompt", 0.25),
        ("hand_written-1", 0.5),
        ("soft", 0.75),
        ("soft-2", 1.0),
    ]
    by_name = {arm.name: arm for arm in task.arms}
    wanted = paired_rates([True, False, True, False], [True] * 4)
    compared = by_name["hand_written-1"]
    assert (compared.difference, compared.p_value) == (-0.5, wanted.p_value)
    assert task.detectable_difference == wanted.detectable_difference
    assert by_name["soft-2"].difference is None
    assert by_name["soft"].training_seconds == 4
    assert by_name["soft"].ece == pytest.approx(0.05)
    keys = {"name", "kind", "score", "low", "high", "difference", "difference_low"}
    keys |= {"difference_high", "p_value", "tokens_per_query", "flops_per_query", "bytes"}
    content = json.loads(Evaluation(tasks={"diet": task}).model_dump_json())
    assert all(keys <= arm.keys() for arm in content["tasks"]["diet"]["arms"])


def test_of_equal_scores_the_lowest_loss_is_the_best(tmp_path: Path) -> None:
    task = results(tmp_path, {"no_prompt": "1000", "soft": "1101", "soft-2": "1101"})
    assert task.best == "soft"
    arms = [arm for arm in build(tmp_path, make_run(tmp_path))[0] if arm.kind == "prompt"]
    arms.append(replace(arms[0], name="soft-2"))
    lower = [record | {"loss": 0.5} for record in records("1101")]
    of_arms = {"soft": [record | {"loss": 1.0} for record in records("1101")], "soft-2": lower}
    assert TaskResults(arms, of_arms, "accuracy", "all", COST, None).evaluation().best == "soft-2"


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    arms, _ = build(tmp_path, make_run(tmp_path))
    values = {a.name: records("1111") for a in arms}
    compared = TaskResults(arms, values, "accuracy", "half", COST, None)
    chosen, reported = compared.chosen_on, compared.reported
    assert sorted(chosen + reported) == [0, 1, 2, 3]
    assert chosen
    assert reported
    first = "".join("1" if row in chosen else "0" for row in range(4))
    second = "".join("0" if row in chosen else "1" for row in range(4))
    task = results(
        tmp_path, {"no_prompt": "0000", "soft": first, "soft-2": second}, select_on="half"
    )
    assert task.best == "soft"
    assert task.rows == len(reported)
    assert {arm.name: arm.score for arm in task.arms} == {"no_prompt": 0, "soft": 0, "soft-2": 1}
    assert "soft was chosen on the other half of the rows." in remarks(task)


def test_the_table_states_on_which_rows_the_best_was_chosen(tmp_path: Path) -> None:
    task = results(tmp_path, {"no_prompt": "1000", "soft": "1101", "soft-2": "1111"})
    assert any("was chosen on these same rows" in line for line in remarks(task))
    assert any("on 4 rows with 80% power" in line or "too few" in line for line in remarks(task))
    alone = results(tmp_path, {"no_prompt": "1000", "soft": "1101"})
    assert not any("chosen" in line for line in remarks(alone))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    arms, _ = build(tmp_path, make_run(tmp_path))
    values = {arm.name: records("1111") for arm in arms}
    values["soft"][1]["loss"] = None
    task = TaskResults(arms, values, "loss", "all", COST, None).evaluation()
    soft = next(arm for arm in task.arms if arm.name == "soft")
    assert (soft.score, soft.difference, task.detectable_difference) == (None, None, None)
    assert "NaN" not in task.model_dump_json()


def test_costs(tmp_path: Path) -> None:
    arms, _ = build(tmp_path, make_run(tmp_path), shots=2)
    costs = {arm.name: query_cost(arm, COST) for arm in arms}
    rows = arms[0].rows.candidates
    text = sum(row[0].target_start for row in rows) / len(rows)
    # A row's text is read once, then each choice without its last token.
    answers = sum(len(c.input_ids) - c.target_start - 1 for row in rows for c in row) / len(rows)
    assert costs["no_prompt"][0] == pytest.approx(text + answers)
    assert costs["soft"][0] == pytest.approx(costs["no_prompt"][0] + 4)
    assert costs["shots-2"][0] > costs["soft"][0] > costs["no_prompt"][0]
    assert training_flops(SUMMARY, COST) == 2 * 2 * 1000 * 500 / 2
    assert training_flops(None, COST) is None
    assert paid_after(1000.0, 10, 20) == 100
    assert paid_after(1000.0, 20, 20) is None


def test_a_narrow_terminal_gets_fewer_columns(tmp_path: Path) -> None:
    task = results(tmp_path, {"no_prompt": "1000", "hand_written-1": "0000", "soft": "1101"})
    columns, rows = titles(task), [cells(task, arm) for arm in task.arms]
    names = [label(task, arm) for arm in task.arms]
    for width in (60, 80, 100, 200):
        kept, shown, left_out, name = _fit(columns, rows, names, width)
        assert kept[:2] == ["accuracy", "difference"]
        assert len(kept) + len(left_out) == len(columns)
        longest = [max(map(len, column)) for column in zip(kept, *shown, strict=True)]
        assert sum(longest) + 3 * len(kept) + name <= max(width, 75)
    assert left_out == []


def test_the_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = results(tmp_path, {"no_prompt": "1000", "hand_written-1": "0000", "soft": "1101"})
    show("diet", task, Console(sys.stdout, sys.stderr))
    printed = capsys.readouterr().out
    assert "diet (4 rows)" in printed
    assert "* soft" in printed
    assert "hand_written-1: “What does this animal eat?”" in printed
    assert "difference: to soft, the best trained prompt (*)" in printed


def test_a_long_text_does_not_widen_the_table_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = results(tmp_path, {"no_prompt": "1000", "hand_written-1": "0000", "soft": "1101"})
    text = "What does this animal eat? " * 10
    arms = [a.model_copy(update={"text": text}) if a.text else a for a in task.arms]
    show("diet", task.model_copy(update={"arms": arms}), Console(sys.stdout, sys.stderr))
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "hand_written-1" in line)
    assert "…" in line
    assert text not in line
    assert len(line) < len(text)


def test_arms_have_different_names() -> None:
    arms: list[Any] = [
        SimpleNamespace(name="shots-3", kind="shots"),
        SimpleNamespace(name="shots-3", kind="prompt"),
        SimpleNamespace(name="shots-3", kind="adapter"),
    ]
    assert _unique(arms) == ["shots-3", "prompt-shots-3", "adapter-shots-3"]


def test_note_shows_instructions_as_they_are(tmp_path: Path) -> None:
    folder = run_folder.write_inputs(tmp_path / "run")
    run_folder.write_results(folder)
    path, text = folder / "summary.json", "![x](http://host/y) | <b>*z*</b>"
    summary = json.loads(path.read_text())
    summary["tasks"]["triage"]["hand_written"][0]["text"] = text
    path.write_text(json.dumps(summary))
    note = read_results(folder).note
    assert text not in note
    assert markdown(text) in note


def test_a_long_note_ends_with_a_whole_line(tmp_path: Path) -> None:
    folder = run_folder.write_inputs(tmp_path / "run")
    run_folder.write_results(folder)
    soft, *_ = results(tmp_path, {"soft": "1111"}).arms
    arms = [soft.model_copy(update={"name": f"soft-{number}"}) for number in range(80)]
    task = TaskEvaluation(
        rows=4, metric="accuracy", detectable_difference=None, best=None, arms=arms
    )
    content = Evaluation(tasks={"triage": task}).model_dump_json()
    (folder / EVALUATION_FILE).write_text(content)
    *lines, empty, last = read_results(folder).note.split("\n")
    assert (empty, last) == ("", "The rest is in report.html.")
    assert lines[-1].startswith("| soft-")
    assert lines[-1].endswith(" |")
    assert MAX_TAG - 200 < len("\n".join([*lines, empty, last])) <= MAX_TAG


def test_report_and_note_show_the_evaluation(tmp_path: Path) -> None:
    scores = {"no_prompt": "1000", "hand_written-1": "1010", "soft": "1111"}
    task = results(tmp_path, scores)
    folder = run_folder.write_inputs(tmp_path / "run")
    run_folder.write_results(folder)
    evaluation = Evaluation(tasks={"triage": task})
    (folder / EVALUATION_FILE).write_text(evaluation.model_dump_json())
    html = write_report(folder).read_text()
    shown = re.sub("<[^>]+>", "", html).replace("\N{NO-BREAK SPACE}", " ")
    note = read_results(folder).note
    for arm in task.arms:
        for cell in cells(task, arm):
            assert cell in shown
            assert cell in note
    for line in remarks(task):
        assert line in html
        assert markdown(line) in note
    (folder / EVALUATION_FILE).write_text("{}")
    assert "Evaluation on" not in write_report(folder).read_text(), "a damaged file is left out"
