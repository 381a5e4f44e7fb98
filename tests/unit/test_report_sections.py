"""Sections of the report: sweeps, differences, inspection, lint, many prompts, PNG copies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.run_folder import finished_run, small_config
from trainer.evaluation.prediction_files import baseline_file, path_of
from trainer.reporting.evaluation import TaskEvaluation, by_rank, remarks
from trainer.reporting.html import write_report
from trainer.reporting.html.collect import collect
from trainer.reporting.html.inspection_view import inspection_view
from trainer.reporting.html.paired_rows import paired_rows
from trainer.reporting.html.plots import COLORS, PALEST, Curve, _depths, curve_plots, grid_plot
from trainer.reporting.html.sweep_grids import sweep_grids
from trainer.reporting.inspection import INSPECTION_FILE, PromptInspection
from trainer.reporting.result_table import TaskTable, task_tables
from trainer.reporting.summary import Comparison, Planned, RunSummary, load_summary, save_summary
from trainer.tracking.run_metadata import RunMetadata

PNG = b"\x89PNG"


def table_of(prompts: dict[str, float], settings: list[dict[str, Any]]) -> TaskTable:
    scores = {name: {"validation_accuracy": score} for name, score in prompts.items()}
    task = {"no_prompt": {"validation_accuracy": 0.3}, "rows": {"validation": 10}}
    summary = RunSummary.model_validate(
        {"status": "finished", "prompts": scores, "tasks": {"t": task}}
    )
    return task_tables(small_config("accuracy", settings), summary)[0]


@pytest.mark.parametrize(("metric", "unit"), [("accuracy", "in points, "), ("loss", "")])
def test_the_unit_of_differences_is_stated(metric: str, unit: str) -> None:
    task = TaskEvaluation(rows=9, metric=metric, detectable_difference=None, best="p", arms=[])
    assert f"the best trained prompt (*), {unit}paired by row" in remarks(task)[0]


def test_the_headline_names_the_best_baseline():
    table = table_of({"p": 0.3}, [{"name": "p"}])
    compared = Comparison(
        baseline="no_prompt",
        prompt="p",
        rows=10,
        difference=0.0,
        low=-0.1,
        high=0.1,
        p_value=1.0,
        detectable_difference=0.6,
        test="McNemar exact",
        better=False,
        also_better=[],
    )
    assert replace(table, comparison=compared).headline == (
        "No trained prompt is significantly better than the best baseline (no prompt)"
    )


@pytest.mark.parametrize(("score", "headline"), [(0.2, "No trained prompt"), (0.4, "Take p")])
def test_without_a_paired_test_a_prompt_below_the_best_baseline_is_not_taken(
    score: float, headline: str
) -> None:
    table = table_of({"p": score}, [{"name": "p"}])  # the baseline has 0.3
    assert table.comparison is None
    assert table.headline.startswith(headline)


def test_a_sweep_is_a_grid_of_mean_scores_with_the_best_prompt_framed():
    settings = [
        {
            "name": f"p{n}-{rate}-{seed}",
            "num_virtual_tokens": n,
            "learning_rate": rate,
            "seed": seed,
        }
        for n in (5, 20)
        for rate in (0.01, 0.1)
        for seed in (0, 1)
    ][:-2]
    scores = dict(zip([s["name"] for s in settings], (0.1, 0.3, 0.5, 0.7, 0.9, 0.6), strict=True))
    (grid,) = sweep_grids(small_config("accuracy", settings), table_of(scores, settings))
    assert (grid.rows, grid.columns) == (["5", "20"], ["0.01", "0.1"])
    assert grid.texts == [["20.0%", "60.0%"], ["75.0%", ""]]
    assert grid.best == (1, 0)


def test_equal_scores_are_told_apart_by_the_loss():
    settings = [
        {"name": f"p{n}", "num_virtual_tokens": n, "learning_rate": 0.1} for n in (2, 5, 10)
    ]
    table = table_of({s["name"]: 1.0 for s in settings}, settings)
    for row, loss in zip(table.prompts, (0.4, 0.02, 0.001), strict=True):
        row.scores["validation_loss"] = loss
    by_score, by_loss = sweep_grids(small_config("accuracy", settings), table)
    assert (by_score.title, by_loss.title) == ("accuracy, prompt tuning", "loss, prompt tuning")
    assert by_loss.lower_is_better
    svg = grid_plot("equal", by_score).svg
    assert "100.0%" in svg
    assert "#ffffff" not in svg, "dark text on pale cells"
    depths = [depth for row in _depths(by_loss) for depth in row]
    ranked = sorted(zip((0.4, 0.02, 0.001), depths, strict=True), reverse=True)
    assert [depth for _, depth in ranked] == sorted(depths)
    assert (min(depths), max(depths)) == pytest.approx((PALEST, 1))
    assert "#ffffff" in grid_plot("loss", by_loss).svg, "white text on the darkest cell"


def test_two_prompts_are_no_sweep():
    settings = [{"name": "a", "num_virtual_tokens": 5}, {"name": "b", "num_virtual_tokens": 20}]
    table = table_of({"a": 0.5, "b": 0.6}, settings)
    assert sweep_grids(small_config("accuracy", settings), table) == []


def test_every_entry_is_compared_with_the_best_prompt_by_its_predictions(tmp_path):
    def write(name: str, correct: str) -> None:
        path = path_of(tmp_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [{"row": i, "correct": c == "1"} for i, c in enumerate(correct)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    settings = [{"name": name} for name in ("best", "same", "unknown")]
    table = table_of({"best": 0.9, "same": 0.9, "unknown": 0.2}, settings)
    write("best", "1111111110")
    write("same", "1111111101")
    write(baseline_file("t", "no_prompt"), "1110000000")
    assert [
        (r.label, r.difference.split(" ")[0], r.outcome) for r in paired_rows(tmp_path, table)
    ] == [
        ("no prompt", "-60.0", "worse"),
        ("same", "+0.0", "not significant"),
    ]


def test_the_inspection_shows_only_what_has_a_meaning():
    token = {"index": 0, "nearest": [{"token": " pill", "cosine": 0.31}], "leave_one_out": 0.02}
    token |= {"attention": [0.1, None, 0.3]}
    controls = {"random": {"elicited": "the the", "class_rate": 0.0, "loss": 8.0}}
    inspection = PromptInspection.model_validate(
        {"task": "t", "tokens": [token], "elicited": "acne or pain", "class_rate": 0.25}
        | {"controls": controls, "notes": ["other_task: one task only"]}
    )
    view = inspection_view("p", inspection)
    assert view.titles == ["token", "nearest tokens, cosine", "loss without it", "attention"]
    assert view.tokens == [["0", "'\xa0pill'\xa00.31", "+0.02000", "20.0%"]]
    assert view.controls == [
        ["this prompt", "acne or pain", "25%", "–"],
        ["control: random", "the the", "0%", "8.0000"],
    ]


def test_many_prompts_of_many_tasks_are_shown_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.reporting.html.collect.curve_plots", lambda *_: [])
    folder = finished_run(tmp_path)
    run = yaml.safe_load((folder / "run.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for number in range(20):
        name = f"sweep-{number:02d}"
        run["prompts"].append(run["prompts"][0] | {"name": name})
        result = summary["prompts"]["triage"]
        summary["prompts"][name] = result | {"validation_accuracy": 0.9 - number / 100}
    for number in range(2):
        run["tasks"].append(run["tasks"][0] | {"name": f"more-{number}"})
        run["prompts"].append(
            run["prompts"][0] | {"name": f"of-{number}", "task": f"more-{number}"}
        )
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "summary.json").write_text(json.dumps(summary))
    html = write_report(folder).read_text()
    assert "<summary>12 more prompts</summary>" in html
    assert html.count("sweep-19") >= 1
    overview = html[html.index("<thead>") : html.index("</table>")]
    for task in ("triage", "animals", "more-0", "more-1"):
        assert f">{task}</a>" in overview
    assert "Take triage (20 virtual tokens)" in overview
    assert "No prompt can be recommended" in overview


def test_the_prompt_to_take_is_shown_and_marked(tmp_path, monkeypatch):
    """A shorter prompt that is as good as the best one, but not among those shown at once."""
    monkeypatch.setattr("trainer.reporting.html.collect.curve_plots", lambda *_: [])
    folder = finished_run(tmp_path)
    run = yaml.safe_load((folder / "run.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    result = summary["prompts"]["triage"]
    for number in range(20):
        name = f"sweep-{number:02d}"
        run["prompts"].append(run["prompts"][0] | {"name": name})
        summary["prompts"][name] = result | {"validation_accuracy": 0.5 - number / 100}
    summary["overfitting"] = {"triage": {"prompt": "triage", "take": "sweep-15"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "summary.json").write_text(json.dumps(summary))
    html = write_report(folder).read_text()
    shown, folded = html.split("<summary>11 more prompts</summary>")
    assert "Take sweep-15 (20 virtual tokens)" in shown
    (row,) = re.findall(r"<tr[^>]*>\n<th[^>]*>.*sweep-15.*", shown)
    assert "recommended" in row
    assert "recommended" not in folded


def test_an_evaluation_of_many_prompts_shows_the_best_ones_first() -> None:
    arm = {"low": None, "high": None, "tokens_per_query": 1.0, "flops_per_query": 1.0, "bytes": 1}
    arms = [arm | {"name": "no_prompt", "kind": "no_prompt", "score": 0.0}]
    arms += [arm | {"name": f"p{i}", "kind": "prompt", "score": i / 100} for i in range(14)]
    arms += [arm | {"name": "lora", "kind": "adapter", "score": 0.0}]
    values = {"rows": 5, "metric": "accuracy", "detectable_difference": None, "best": "p13"}
    task = TaskEvaluation.model_validate(values | {"arms": arms})
    first, others = by_rank(task, 10)
    expected = ["no_prompt", *(f"p{i}" for i in range(4, 14)), "lora"]
    assert [each.name for each in first] == expected
    assert [each.name for each in others] == ["p0", "p1", "p2", "p3"]
    losses = task.model_copy(update={"metric": "loss"})
    assert [each.name for each in by_rank(losses, 10)[1]] == ["p10", "p11", "p12", "p13"]
    equal = [each.model_copy(update={"score": 0.5, "loss": each.score}) for each in task.arms]
    equal_task = task.model_copy(update={"arms": equal})
    assert [each.name for each in by_rank(equal_task, 10)[1]] == ["p10", "p11", "p12", "p13"]
    assert by_rank(task, 12)[1] == [], "two more are not worth a part of their own"


def test_findings_in_hand_written_texts_are_shown_with_rewrites(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.reporting.html.collect.curve_plots", lambda *_: [])
    folder = finished_run(tmp_path)
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run["tasks"][0]["hand_written"] = ["Please sort this note, and don't mention <names>."]
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (text,) = [each for each in collect(folder).tasks[0].lint if "<names>" in each.text]
    assert text.findings
    html = write_report(folder).read_text()
    assert "don&#39;t mention &lt;names&gt;" in html
    assert text.findings[0].rule in html


def test_plots_have_png_copies_for_mlflow(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    write_report(folder)
    plots = sorted(path.name for path in (folder / "plots").iterdir())
    assert plots == [
        "animals-accuracy.png",
        "animals-loss.png",
        "triage-accuracy.png",
        "triage-loss.png",
        "useful_tokens_per_second.png",
    ]
    assert all((folder / "plots" / name).read_bytes().startswith(PNG) for name in plots)
    artifacts = RunMetadata(folder).late_artifacts()
    sent = {a.path.name for a in artifacts if a.folder == "plots" and a.prompt is None}
    assert sent == set(plots)


def test_measured_effects_of_rewrites_stand_beside_the_findings(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.reporting.html.collect.curve_plots", lambda *_: [])
    folder = finished_run(tmp_path)
    text = "Please sort this note."
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run["tasks"][0]["hand_written"] = [text]
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    effect = {"difference": 0.021, "low": 0.003, "high": 0.039, "p_value": 0.02}
    effect |= {"detectable_difference": 0.05, "score": 0.5}
    finding = {"rule": "filler", "start": 0, "end": 6, "why": "Says nothing.", "rewrite": ""}
    finding |= {"measurable": True, "effect": effect}
    checked = {"place": "hand_written", "task": "triage", "text": text, "findings": [finding]}
    checked |= {"metric": "accuracy", "rows": 150, "score": 0.48}
    (folder / "lint").mkdir()
    (folder / "lint" / "lint.json").write_text(json.dumps({"prompts": [checked]}))
    assert "+2.1 (0.3 to 3.9)" in write_report(folder).read_text()


def test_the_plan_stands_beside_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.reporting.html.collect.curve_plots", lambda *_: [])
    planned = Planned(
        seconds=90.0,
        step_seconds=1.0,
        useful_tokens_per_second=5100.4,
        base_bytes_per_rank=3_400_000,
        peak_bytes=1,
        saved_bytes=1,
        gathered_bytes_per_step=1e7,
        flops_per_step=1e9,
        load_seconds=1.5,
    )
    folder = finished_run(tmp_path)
    summary = load_summary(folder)
    assert summary is not None
    changes = {"planned": planned, "time": {"total": 180.0}}
    save_summary(folder, summary.model_copy(update=changes))
    facts = {fact.name: fact for fact in collect(folder).facts}
    assert (facts["useful tokens/s"].value, facts["useful tokens/s"].planned) == ("5,204", "5,100")
    hours = facts["rank-hours (CPU)"]
    assert (hours.value, hours.planned) == ("0.1", "0.05"), "two ranks"
    assert "planned 3.4 MB" in write_report(folder).read_text()
    save_summary(folder, summary.model_copy(update=changes | {"rank_seconds": 720.0}))
    hours = {fact.name: fact for fact in collect(folder).facts}["rank-hours (CPU)"]
    assert hours.value == "0.2", "an earlier start had more ranks"


class StackedCells(HTMLParser):
    """Cells of the tables whose rows are stacked in narrow windows, where headers are hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.depth: list[bool] = []
        self.titles: list[str | None] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "div":
            self.depth.append("stack" in (values.get("class") or "").split())
        if tag == "td" and any(self.depth):
            self.titles.append(values.get("data-title"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.depth.pop()


def test_cells_have_titles_where_headers_are_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.reporting.html.collect.curve_plots", lambda *_: [])
    folder = finished_run(tmp_path)
    token = {"index": 0, "leave_one_out": 0.02, "attention": [0.1]}
    inspected = {"task": "triage", "tokens": [token], "elicited": "acne", "class_rate": 0.25}
    (folder / INSPECTION_FILE).write_text(json.dumps({"prompts": {"triage": inspected}}))
    cells = StackedCells()
    cells.feed(write_report(folder).read_text())
    assert all(cells.titles)
    expected = {"accuracy", "text elicited", "loss without it", "rewrite", "file"}
    assert expected <= set(cells.titles)


def test_dollar_signs_in_the_name_of_a_class_are_no_formula() -> None:
    """matplotlib would draw ``$5 to $`` as a formula, and fail at ``$\\frac{$``."""
    levels = {'always "$5 to $10"': 0.3, 'always "$\\frac{$"': 0.5}
    curve = Curve("soft", COLORS[0], [])
    _, accuracy = curve_plots("t", [curve], "accuracy", levels, "step", "loss")
    assert all(f">{name}</text>" in accuracy.svg for name in levels)
