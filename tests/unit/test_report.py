from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from tests.unit.run_folder import HAND_WRITTEN, PROMPTS, STEPS, finished_run, write_inputs
from trainer.config import load_output
from trainer.reporting.html import collect as collect_module
from trainer.reporting.html import write_report
from trainer.reporting.html.collect import collect
from trainer.reporting.mlflow_note import read_results
from trainer.reporting.summary import load_summary
from trainer.reporting.terminal_table import show_results
from trainer.runtime.console import Console
from trainer.tracking.progress_file import ProgressFile


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of text: drawing the four plots of a page takes most of a second."""
    monkeypatch.setattr("trainer.reporting.html.collect.curve_plots", lambda *_: [])


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(finished_run(tmp_path_factory.mktemp("report") / "support")).read_text()


def test_the_page_shows_every_result(html: str) -> None:
    for text in [*PROMPTS, *(t for hard in HAND_WRITTEN.values() for t, *_ in hard)]:
        assert text in html
    for text in (
        "94.0%",
        "34.0%",
        "69.0%",
        "5,204",
        "3.41 MB",
        "all-gather volume / step",
        "git revision",
    ):
        assert text in html
    assert (
        html.count("<svg") == 2 * 2 * 2 + 1
    )  # two tasks by two metrics by two x axes, and the speed
    assert "promptshard generate" in html
    assert "mlflow ui" in html


def test_the_page_needs_no_network_and_is_well_formed(html: str) -> None:
    assert not re.search(r"(?:src|href)=\"(?!#)|@import|url\((?!#)|<script", html)
    open_tags: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "input"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Check().feed(html)
    assert not open_tags


@pytest.mark.usefixtures("no_curves")
def test_warnings_describe_the_problem(tmp_path: Path) -> None:
    report = collect(finished_run(tmp_path))
    assert len(report.warnings) == 1
    assert "3 of 600 rows were truncated" in report.warnings[0]


@pytest.mark.usefixtures("no_curves")
def test_rows_that_are_also_in_train_are_counted_and_named(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    summary["data"]["triage"]["validation"]["also_in_train"] = 9
    (folder / "summary.json").write_text(json.dumps(summary))
    sources = json.loads((folder / "datasets.json").read_text())
    item = next(s for s in sources if (s["task"], s["split"]) == ("triage", "validation"))
    item["also_in_train"] = [["v.jsonl:3", "t.jsonl:8"]]
    (folder / "datasets.json").write_text(json.dumps(sources))
    assert (
        "triage: 9 of 150 validation rows also appear in the training data "
        "(v.jsonl:3 is t.jsonl:8; ...); scores may be inflated."
    ) in collect(folder).warnings


@pytest.mark.usefixtures("no_curves")
def test_a_worse_prompt_is_not_called_better(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    summary["prompts"]["animals"]["validation_accuracy"] = 0.5
    (folder / "summary.json").write_text(json.dumps(summary))
    task = collect(folder).tasks[1]
    assert task.table.verdict == (
        "Best prompt: animals (50.0%); best baseline (“In the wild, what does this animal do?”: "
        "74.0%); no paired test was possible."
    )
    assert [row.tag for row in task.table.rows if row.best] == ["best baseline", "best prompt"]


def test_an_interrupted_run_has_a_page(tmp_path: Path) -> None:
    html = write_report(write_inputs(tmp_path)).read_text()
    assert "unfinished" in html
    assert "The run did not finish (no summary.json)." in html


def test_some_steps_of_a_long_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "MOST_LINES", 20)
    lines = collect_module._read_metrics(finished_run(tmp_path))
    for name in (None, *PROMPTS):
        steps = [line.step for line in lines[name] if not line.is_validation]
        assert steps == [*range(8, STEPS, 8), STEPS]
    scored = [line.step for line in lines["animals"] if line.is_validation]
    assert scored == [*range(0, STEPS + 1, 20)]


def test_text_of_users_is_escaped_and_credentials_hidden(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, uri="http://me:hunter2-secret@host")
    summary = json.loads((folder / "summary.json").read_text())
    summary["tasks"]["triage"]["hand_written"][0]["text"] = "<script>alert(1)</script>"
    (folder / "summary.json").write_text(json.dumps(summary))
    html = write_report(folder).read_text()
    assert "<script" not in html
    assert "hunter2-secret" not in html


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.mark.usefixtures("no_curves")
def test_the_selected_prompt_and_why_prompts_stopped(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    prompts = summary["prompts"]
    prompts["triage"] |= {"stopped": {"step": 120, "reason": "finished"}}
    prompts["triage"] |= {"validation_accuracy_standard_error": 0.02}
    prompts["triage-mlp"] |= {"stopped": {"step": 40, "reason": "halving"}}
    prompts["animals"] |= {"stopped": {"step": 17, "reason": "diverged"}}
    shorter = {"prompt": "triage-mlp", "score": 0.91, "num_virtual_tokens": 10}
    why = {"prompt": "triage", "why": "best of 2 prompts", "shorter": shorter}
    summary["selected"] = {"triage": why, "animals": {"prompt": "animals", "why": "the only one"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    report = collect(folder)
    triage, animals = report.tasks
    assert triage.table.advice == (
        "Best prompt: triage (best of 2 prompts). A shorter prompt within one standard error: "
        "triage-mlp, 10 virtual tokens, 91.0%."
    )
    assert [row.label for row in triage.table.rows if row.tag == "best prompt"] == ["triage"]
    assert animals.table.advice == "", "one prompt leaves nothing to select"
    details = triage.details | animals.details
    assert details["triage-mlp"].endswith("eliminated by halving at step 40")
    assert details["animals"].endswith("diverged at step 17")
    assert "finished" not in details["triage"]
    assert any(text.startswith("animals: diverged and was stopped") for text in report.warnings)
    assert not any(key.endswith("error") for key in triage.table.columns)
    html = write_report(folder).read_text()
    assert html.count('<span class="tag">best prompt</span>') == 1, "a diverged one is not best"
    assert "Best prompt: triage (best of 2 prompts)." in html


def test_a_divergence_is_not_called_a_loss(tmp_path: Path) -> None:
    """On the page, in MLflow's description and beside its final metrics; nor is it compared."""
    folder = finished_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    run = yaml.safe_load((folder / "run.yaml").read_text())
    taught = {"validation_loss": 0.777, "validation_agreement": 0.25}
    for name in ("triage", "animals"):
        summary["prompts"][name] |= {"objective": "distill", "validation_loss": 0.123}
        prompt = next(p for p in run["prompts"] if p["name"] == name)
        prompt |= {"objective": "distill", "teacher": f"Teacher of {name}."}
        summary["tasks"][name]["untaught"] = {name: taught}
    for task in run["tasks"]:
        task["metric"] = "loss"
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    report = collect(folder)
    triage, animals = report.tasks
    divergence = "validation_KL_divergence"
    for task in (triage, animals):
        rows = {row.label: row for row in task.table.rows}
        assert rows[task.table.task].shown[divergence] == 0.123
        assert "validation_loss" not in rows[task.table.task].shown
        untaught = rows[f"no prompt, compared with the teacher of {task.table.task}"]
        assert untaught.shown[divergence] == 0.777
        assert divergence not in rows["no prompt"].shown
        assert "distilled" in task.details[task.table.task]
    assert triage.table.verdict.startswith("Best prompt: triage-mlp ("), "the only one with a loss"
    assert animals.table.verdict.startswith(
        "Best prompt: animals (0.1230); best baseline (no prompt, compared with the teacher of "
        "animals: 0.7770)"
    )
    html = write_report(folder).read_text()
    assert '<th scope="col" class="n">KL divergence</th>' in html
    results = read_results(folder)
    note = results.note
    assert "| **animals** (20 virtual tokens), best prompt | " in note
    assert "KL divergence" in note
    scores = results.prompts["animals"].metrics
    assert scores["validation_loss_best"] == 0.123
    assert scores["validation_loss_no_prompt"] == 0.777
    assert "validation_loss_hand_written" not in scores


@pytest.mark.usefixtures("no_curves")
def test_uploading_is_suggested_only_if_mlflow_could_not_be_reached(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    assert "promptshard sync" not in write_report(folder).read_text()
    state = ProgressFile(folder)
    state.problem = "connection refused"
    state.save()
    assert "Upload missing metrics" in write_report(folder).read_text()


@pytest.mark.usefixtures("no_curves")
def test_commands_are_those_of_the_selected_prompt(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "support")
    summary = json.loads((folder / "summary.json").read_text())
    summary["selected"]["triage"]["prompt"] = "triage-mlp"
    (folder / "summary.json").write_text(json.dumps(summary))
    html = write_report(folder).read_text()
    assert "--prompt triage-mlp" in html
    assert "prompts/triage-mlp" in html


@pytest.mark.parametrize("content", ["[" * 100_000, "5", "{", "9" * 5000])
def test_damaged_files_count_as_missing(tmp_path: Path, content: str) -> None:
    folder = finished_run(tmp_path)
    for name in ("summary.json", "environment.json", "datasets.json"):
        (folder / name).write_text(content)
    (folder / "run.yaml").write_text("a: &a [*a]")
    assert collect(folder).warnings


class _Cells(HTMLParser):
    """Rows of the result tables of a page: label and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = tag
        elif dict(attrs).get("class") in ("detail", "tag"):
            self.inside = None

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data.strip()


@pytest.mark.usefixtures("no_curves")
def test_terminal_page_and_mlflow_note_show_the_same_table(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    html = write_report(folder).read_text()
    page = _Cells()
    for table in re.findall(r'<section class="task".*?</table>', html, re.DOTALL):
        page.feed(table[table.index("<table>") :])

    class Recorder(Console):
        """Records tables, of a terminal that is wide enough for all columns."""

        rows: ClassVar[list[list[str]]] = []
        width = 1000

        def table(
            self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], **_: object
        ) -> None:
            stopped = -1 if columns[-1] == "stopped" else len(columns)
            self.rows.extend([row[0].strip("* "), *row[2:stopped]] for row in [columns, *rows])

    summary = load_summary(folder)
    assert summary is not None
    show_results(summary, load_output(folder), Recorder(io.StringIO(), io.StringIO()))
    note = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in read_results(folder).note.splitlines()
        if line.startswith("| ")
    ]
    assert len(page.rows) == len(Recorder.rows) == len(note) == 5 + 7 - 1 + 2
    for on_page, in_note in zip(page.rows, note, strict=True):
        assert on_page[1:] == in_note[1:]
        label = on_page[0][:50]
        assert in_note[0].strip("*").startswith(label)
        # The terminal has the prompts first.
        same = [row for row in Recorder.rows if row[0].removeprefix("baseline: ").startswith(label)]
        assert on_page[1:] in [row[1:] for row in same]
