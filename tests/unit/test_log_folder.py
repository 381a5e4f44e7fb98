"""Logs of commands that read a run of another user, or on a read-only file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import start
from launch.exit_report import ExitReport
from trainer.runtime.errors import BadInput
from trainer.runtime.log_folder import inference_logs


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "rank-0.log").touch()
    return folder


def test_logs_are_in_the_run_if_that_can_be_written(run_dir: Path, tmp_path: Path) -> None:
    assert inference_logs(run_dir) == run_dir / "logs"
    (tmp_path / "new").mkdir()
    assert inference_logs(tmp_path / "new") == tmp_path / "new" / "logs"


@pytest.mark.parametrize("what", ["logs", "logs/rank-0.log"])
def test_logs_are_in_the_cache_otherwise(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """Root may write everywhere, so the system's answer is replaced."""
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != run_dir / what and allowed(path, mode)
    )
    runs: list[Path] = []

    def run_local(command: object, environment: object, log: Path, *_: object) -> ExitReport:
        runs.append(log)
        return ExitReport(0)

    monkeypatch.setattr(start.launcher_process, "run_local", run_local)
    start.start_ranks("trainer.commands.generate", [], str(run_dir), 1, None, single=True)
    assert runs == [inference_logs(run_dir) / "launcher-generate.log"]
    assert runs[0].parent.parent == tmp_path / "cache" / "logs"
    assert runs[0].is_file()

    monkeypatch.setenv("PROMPTSHARD_CACHE", os.devnull)
    with pytest.raises(BadInput, match="PROMPTSHARD_CACHE: cannot write to /dev/null/"):
        start.start_ranks("trainer.commands.generate", [], str(run_dir), 1, None, single=True)
