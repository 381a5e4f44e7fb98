"""Message and exit code of a rank that a signal stops: only training can be resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_launch import RUN

ROOT = Path(__file__).resolve().parents[2]
#: The program of a rank, with a signal in place of its work.
RANK = """
import os, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
def stop(*args, **kwargs):
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    signal.pause()
if sys.argv[1] == "train":
    sys.modules["trainer.run"] = types.SimpleNamespace(train=stop)
    from trainer.__main__ import main
    sys.exit(main([sys.argv[2] + "/run.yaml"]))
from trainer.commands import generate
generate._generate = stop
sys.exit(generate.main([sys.argv[2] + "/out", "--prompt=triage", "--input=words"]))
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(
    ("command", "checkpoints", "code", "words"),
    [
        (
            "train",
            ["step-00000007"],
            75,
            "Stopped. Rerun the command to resume from step-00000007.",
        ),
        ("train", [], 75, "Stopped before the first checkpoint. Rerun the command to start over."),
        ("generate", ["step-00000007"], 1, "Stopped."),
    ],
)
def test_only_training_reports_that_it_can_be_resumed(
    tmp_path, command, checkpoints, code, words, signal_name
):
    run = RUN.format(folder=tmp_path)
    (tmp_path / "run.yaml").write_text(run)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.yaml").write_text(run)
    for name in checkpoints:
        (tmp_path / "out" / "checkpoints" / name).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", RANK, command, str(tmp_path), signal_name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr == f"{words}\n"
