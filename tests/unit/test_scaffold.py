"""``promptshard examples``: a new user's first files."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import preflight
from launch.commands import app
from trainer.runtime.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_copied_examples_work_inside_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = call("examples", "new/work")
    monkeypatch.chdir("new/work")
    copied = sorted(path.name for path in Path().glob("*.yaml"))
    assert copied == sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
    for name in copied:
        assert f"  {name}" in shown
        config = preflight.check_run(name, [])
        for task in config.tasks:
            for source in [*task.train, *(task.validation or [])]:
                assert source.path is not None
                assert Path(source.path).is_file()
        assert Path(config.base.model, "config.json").is_file()
    assert not [*Path().rglob("*.py"), *Path().rglob("__pycache__")]


def test_examples_needs_a_new_or_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    call("examples", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="empty: is not empty; name a new or empty folder"):
        call("examples", str(tmp_path / "empty"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInput, match="file: is a file"):
        call("examples", str(file))
    with pytest.raises(BadInput, match="file/below: is a file"):
        call("examples", str(file / "below"))
