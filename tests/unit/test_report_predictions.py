"""What the report shows of predictions: confusions, recall, mistakes and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_folder import finished_run
from trainer.evaluation.prediction_files import path_of
from trainer.reporting.html import write_report
from trainer.reporting.html.prediction_views import MAX_CLASSES, prediction_report
from trainer.tracking.run_metadata import RunMetadata


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    path = path_of(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"row": i, "place": f"v.jsonl:{i}"} | r) for i, r in enumerate(records, 1))
    path.write_text("".join(line + "\n" for line in lines))


def choice(target: str, prediction: str, probability: float, text: str = "") -> dict[str, Any]:
    probabilities = {prediction: probability}
    return {
        "input": text or f"{target} {probability}",
        "target": target,
        "prediction": prediction,
        "correct": target == prediction,
        "scores": {prediction: -1.0},
        "probabilities": probabilities,
        "loss": 1.0,
        "tokens": 2,
    }


def test_choices_have_a_confusion_matrix_recall_and_the_most_confident_mistakes(tmp_path):
    records = [choice("a", "a", 0.9)] * 3 + [choice("a", "b", 0.5 + i / 100) for i in range(12)]
    records += [choice("b", "b", 0.6), choice("b", "c", 0.99)]
    write(tmp_path, "p", records)
    report = prediction_report(tmp_path, "p", ["a", "b", "c"], "accuracy")
    assert report is not None
    assert report.matrix == [[3, 12, 0], [0, 1, 1], [0, 0, 0]]
    recalls = {c.label: (c.rows, c.recall, c.precision) for c in report.classes}
    assert recalls["a"] == (15, "20.0% (7.0–45.2)", "100.0%")
    assert recalls["b"] == (2, "50.0% (9.5–90.5)", "7.7%")
    assert recalls["c"] == (0, "–", "0.0%")
    shown = [example.probability for example in report.examples]
    assert shown == [0.99, *(0.5 + i / 100 for i in reversed(range(3, 12)))]
    assert not any(example.correct for example in report.examples)


def test_many_classes_have_their_most_frequent_confusions(tmp_path):
    labels = [f"c{i}" for i in range(MAX_CLASSES + 1)]
    write(tmp_path, "p", [choice("c1", "c2", 0.5)] * 2 + [choice(c, "c0", 0.5) for c in labels])
    report = prediction_report(tmp_path, "p", labels, "accuracy")
    assert report is not None
    assert report.matrix == []
    assert report.confusions[0] == ("c1", "c2", 2)
    assert len(report.confusions) == MAX_CLASSES


def test_sets_of_labels_written_answers_and_losses(tmp_path):
    sets = [
        {"input": "x", "target": ["a", "b"], "prediction": ["a"], "correct": False},
        {"input": "y", "target": ["b"], "prediction": ["c", "a"], "correct": False},
        {"input": "z", "target": ["b"], "prediction": ["b"], "correct": True},
    ]
    write(tmp_path, "p", sets)
    report = prediction_report(tmp_path, "p", ["a", "b"], "f1")
    assert report is not None
    recalls = [(c.label, c.rows, c.recall) for c in report.classes]
    assert recalls == [("a", 1, "100.0% (20.7–100.0)"), ("b", 3, "33.3% (6.1–79.2)")]
    assert [e.input for e in report.examples] == ["y", "x"]

    write(
        tmp_path,
        "p",
        [{"input": f"{i}", "target": "t", "prediction": "w", "correct": False} for i in range(40)],
    )
    report = prediction_report(tmp_path, "p", [], "exact_match")
    assert report is not None
    assert [e.input for e in report.examples] == [str(4 * i) for i in range(10)]
    assert (report.examples[0].target, report.examples[0].prediction) == ("t", "w")

    write(tmp_path, "p", [{"input": f"{i}", "loss": i, "tokens": 2} for i in range(40)])
    report = prediction_report(tmp_path, "p", [], "loss")
    assert report is not None
    assert [e.loss for e in report.examples] == [i / 2 for i in range(39, 29, -1)]


@pytest.mark.parametrize("content", ["{", "[1]\n", '{"row": 1, "target": 2}\n', "\xff"])
def test_a_damaged_file_is_left_out(tmp_path, content):
    write(tmp_path, "p", [])
    path_of(tmp_path, "p").write_text(content, encoding="latin-1")
    report = prediction_report(tmp_path, "p", ["a", "b"], "accuracy")
    assert report is None or not report.classes


def test_the_page_shows_them_escaped_and_mlflow_gets_the_files(tmp_path):
    folder = finished_run(tmp_path / "support")
    text = "<script>alert(1)</script>"
    write(folder, "triage", [choice("cardiac", "other", 0.75, text), choice("other", "other", 0.9)])
    write(folder, "gone", [])
    for baseline in ("triage/majority", "triage/no_prompt", "animals/no_prompt"):
        write(folder, f"baselines/{baseline}", [])
    write(folder, "evaluation/triage/majority", [])
    html = write_report(folder).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "Predictions of triage on 2 validation rows" in html
    assert "75.0%" in html
    artifacts = {
        (artifact.prompt, artifact.folder, artifact.text)
        for artifact in RunMetadata(folder).late_artifacts()
        if artifact.folder.startswith("predictions")
    }
    assert artifacts == {
        ("triage", "predictions", "triage.jsonl"),
        (None, "predictions/baselines/triage", "majority.jsonl"),
        (
            *(None, "predictions/evaluation/triage"),
            "predictions/evaluation/triage/majority.jsonl",
        ),
        *(
            (None, folder, f"{folder}/no_prompt.jsonl")
            for folder in ("predictions/baselines/animals", "predictions/baselines/triage")
        ),
    }
