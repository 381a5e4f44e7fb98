"""Shell completion: what a shell receives for the words typed so far."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.commands import app
from launch.run_templates import KINDS


def complete(*words: str) -> list[str]:
    """Return the completions of the last word, in the way of bash."""
    environment = {
        "COMP_WORDS": " ".join(["promptshard", *words]),
        "COMP_CWORD": str(len(words)),
        "_PROMPTSHARD_COMPLETE": "complete_bash",
    }
    result = CliRunner().invoke(app, [], prog_name="promptshard", env=environment)
    assert result.exit_code == 0, result.output
    return result.output.split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in (
        "run.yaml",
        "notes.txt",
        "more/a.yaml",
        "more/b.yml",
        "more/rows.csv",
        ".x/c.yaml",
    ):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("tasks: [{name: notes}]\nprompts: [{name: first}, {name: second}]\n")
    Path("runs/one/prompts/first").mkdir(parents=True)
    return tmp_path


def test_commands_kinds_and_run_files_are_completed(folder):
    assert complete("va") == ["validate"]
    assert complete("init", "") == list(KINDS)
    assert complete("train", "r") == ["run.yaml"]
    assert complete("train", "mo") == ["more/a.yaml", "more/b.yml"]
    assert complete("train", "more/b") == ["more/b.yml"]
    assert complete("train", f"{folder}/r") == [f"{folder}/run.yaml"]


def test_settings_are_completed_with_the_names_in_the_run_file(folder):
    assert complete("train", "run.yaml", "training.st") == ["training.steps="]
    assert complete("validate", "run.yaml", "tasks.n")[:2] == [
        "tasks.notes.name=",
        "tasks.notes.train=",
    ]
    learning_rate = complete("train", "run.yaml", "training.steps=5", "prompts.second.learning")
    assert learning_rate == ["prompts.second.learning_rate="]
    assert complete("train", "missing.yaml", "evaluation.ev") == ["evaluation.every="]


def test_trained_prompts_are_completed(folder):
    assert complete("generate", "runs/one", "--prompt", "") == ["first"]
    assert complete("generate", "runs/one", "--input", "x", "--prompt", "f") == ["first"]
    assert complete("generate", "runs/none", "--prompt", "") == []


def test_completion_is_silent_where_it_knows_nothing(folder):
    Path("broken.yaml").write_text("tasks: [\n")
    assert complete("train", "nowhere/x") == []
    assert complete("train", "broken.yaml", "prompts.") == []
    Path("broken.yaml").write_text("prompts: 5\ntasks: [{}, 3]\n")
    assert complete("train", "broken.yaml", "prompts.") == []
