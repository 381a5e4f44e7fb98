"""``promptshard generate``: where its input comes from, and how one rank starts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import launcher_command, launcher_process
from launch.exit_report import ExitReport
from tests.command_line import promptshard
from tests.unit.saved_run import save_run
from trainer.runtime import bootstrap


class Stdin(io.TextIOWrapper):
    def __init__(self, content: bytes, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Commands and environments that would run; nothing starts."""
    starts: list[tuple[Any, ...]] = []

    def run_local(command: Any, environment: Any, *_: Any) -> ExitReport:
        starts.append((command, environment))
        return ExitReport(0)

    monkeypatch.setattr(launcher_process, "run_local", run_local)
    monkeypatch.setattr(launcher_command, "list_gpus", list)
    return starts


def arguments(environment: dict[str, str]) -> Any:
    return json.loads(environment[bootstrap.ARGUMENTS])


@pytest.mark.parametrize("options", [[], ["--input", "-"]])
def test_the_input_is_read_from_stdin(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    run = save_run(tmp_path / "run")
    monkeypatch.setattr(sys, "stdin", Stdin("Ärger:\n a cough\n".encode()))
    assert promptshard("generate", run, "--prompt", "words", *options).returncode == 0
    ((_, environment),) = started
    assert arguments(environment)[2] == "--input=Ärger:\n a cough"


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [
        (Stdin(b"", terminal=True), "--input: is missing; give a text, or -"),
        (Stdin(b" \n"), "stdin has no text"),
        (Stdin(b"a\xff"), "stdin is not UTF-8 at byte 1"),
    ],
)
def test_a_missing_input_is_refused(
    tmp_path: Path,
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    stdin: Stdin,
    problem: str,
) -> None:
    run = save_run(tmp_path / "run")
    monkeypatch.setattr(sys, "stdin", stdin)
    done = promptshard("generate", run, "--prompt", "words")
    assert done.returncode == 2
    assert problem in done.stderr
    assert started == []


def test_one_rank_starts_without_the_launcher(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a job around this command
    for options in ([], ["--processes", "2"]):
        promptshard("generate", run, "--prompt", "words", "--input", "a", *options)
    (alone, own), (launched, _) = started
    assert alone[-1] == launched[-1] == "trainer.commands.generate"
    assert "launch.local_launcher" in launched
    assert "launch.local_launcher" not in alone
    assert "WORLD_SIZE" not in own
