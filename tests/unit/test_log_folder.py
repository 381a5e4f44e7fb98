"""Logs and results of commands that read a run of another user, or a read-only file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import preflight, start
from launch.exit_report import ExitReport
from trainer.runtime.errors import BadInput
from trainer.runtime.log_folder import inference_logs, measurements_folder


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


def test_results_are_in_the_cache_if_the_run_cannot_be_written(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert preflight.measurements_folder(str(run_dir)) == run_dir
    assert capsys.readouterr().err == ""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run_dir and allowed(path, mode))
    folder = preflight.measurements_folder(str(run_dir))
    assert folder == measurements_folder(run_dir)
    assert folder.parent == tmp_path / "cache" / "measurements"
    note = " ".join(capsys.readouterr().err.split())
    assert "cannot be written; results are written to" in note

    log = preflight.open_log(folder / "logs", "launcher-evaluate.log")
    assert log.is_file()
    monkeypatch.setenv("PROMPTSHARD_CACHE", os.devnull)
    with pytest.raises(BadInput, match="PROMPTSHARD_CACHE: cannot write to /dev/null/"):
        preflight.open_log(measurements_folder(run_dir) / "logs", "launcher-evaluate.log")
