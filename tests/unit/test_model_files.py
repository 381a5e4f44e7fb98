"""Input examples and templates of registered prompts, and tables for MLflow's pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from trainer.config import Task
from trainer.tracking.model_files import example_row
from trainer.tracking.registry import Score, template_of
from trainer.tracking.run_metadata import RunMetadata
from trainer.tracking.tables import add_to_tag, evaluation_rows, prediction_rows, to_json


def task(**settings: Any) -> Task:
    plain = {"name": "t", "train": "t.jsonl", "target": "{label}", "metric": "exact_match"}
    return Task.model_validate(plain | settings)


@pytest.mark.parametrize(
    ("template", "text", "row"),
    [
        ("{text}\nTopic:", "Chest pain.\nTopic:", {"text": "Chest pain."}),
        ("{a} or {b}? {a}!", "x or y? x!", {"a": "x", "b": "y"}),
        ("{{json}} {text}.", "{json} two\nlines.", {"text": "two\nlines"}),
        ("({text})", "no brackets", {"text": "..."}),
    ],
)
def test_an_input_example_is_read_back_from_a_prediction(
    tmp_path: Path, template: str, text: str, row: dict[str, str]
) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "p.jsonl").write_text(json.dumps({"input": text}) + "\n")
    assert example_row(RunMetadata(tmp_path), "p", task(input=template)) == row
    (tmp_path / "predictions" / "damaged.jsonl").write_text("{")
    for prompt in ("damaged", "none"):
        assert set(example_row(RunMetadata(tmp_path), prompt, task(input=template))) == set(row)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text}\nTopic:", "Decide.\n{{text}}\nTopic:"),
        ("Note: {virtual_tokens}{text}", "Note: Decide.\n{{text}}"),
    ],
)
def test_a_hand_written_prompt_is_a_template_of_mlflow(template: str, expected: str) -> None:
    assert template_of("Decide.\n", {"input": template}) == expected


def test_tables_have_the_format_of_log_table(tmp_path: Path) -> None:
    records = [
        {"input": "a", "prediction": "x", "target": "y", "correct": False, "loss": 0.5, "row": 1},
        {"input": "b", "prediction": "y", "target": "y", "correct": True, "loss": None, "row": 2},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record | {"scores": {}}) + "\n" for record in records))
    table = json.loads(to_json(prediction_rows(path)))
    frame = pandas.DataFrame(records).astype({"loss": object})
    assert table == json.loads(frame.to_json(orient="split", index=False))

    arms = [{"name": "hand_written-1", "kind": "hand_written", "score": 0.123456789, "text": "A?"}]
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({"tasks": {"t": {"metric": "accuracy", "arms": arms}}}))
    (row,) = evaluation_rows(evaluation)
    shown = [row[name] for name in ("task", "metric", "score", "text")]
    assert shown == ["t", "accuracy", 0.123457, "A?"]
    assert json.loads(to_json([])) == {"columns": [], "data": []}


def test_the_tag_of_tables_keeps_other_tables() -> None:
    tag = add_to_tag(add_to_tag('[{"path": "mine.json", "type": "table"}]', "a.json"), "a.json")
    assert [table["path"] for table in json.loads(tag)] == ["mine.json", "a.json"]
    assert add_to_tag("damaged", "a.json") == add_to_tag(None, "a.json")


def test_a_lower_loss_is_better() -> None:
    assert Score("loss", 0.1, "").is_better_than(Score("loss", 0.2, ""))
    assert not Score("accuracy", 0.1, "").is_better_than(Score("accuracy", 0.2, ""))
