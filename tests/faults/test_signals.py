"""Two ranks that receive stop signals or are killed; the resumed run ends equal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_run import ROOT, one_process, write_run_file
from trainer.runtime import bootstrap
from trainer.runtime.process import UNFINISHED

STEPS = 40
SILENCE = 8  # seconds
WORDS = [
    f"training.steps={STEPS}",
    "evaluation.every=1000",
    "checkpoint.every=1000",
]


class Run:
    """Repeated ``promptshard train`` with two ranks on one output folder."""

    def __init__(self, run_file: Path, output: Path) -> None:
        self.output = output
        self._words = ["train", str(run_file), f"output_dir={output}", *WORDS, "--processes", "2"]
        self.process: Any = None

    def start(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch", *self._words, *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks, in rank order."""
        ranks = {}
        for process in psutil.process_iter():
            try:
                if process.cmdline()[1:3] != ["-u", bootstrap.FILE]:
                    continue
                environ = process.environ()
                if Path(environ[UNFINISHED]).is_relative_to(self.output):
                    ranks[int(environ["RANK"])] = process
            except (psutil.Error, KeyError):
                continue
        return [ranks[rank] for rank in sorted(ranks)]

    def steps(self) -> int:
        """Number of logged steps."""
        try:
            lines = (self.output / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return max((json.loads(line).get("step", 0) for line in lines[:-1]), default=0)

    def until(self, done: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 150
        while not (result := done()):
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return result

    def end(self, seconds: float) -> str:
        text, _ = self.process.communicate(timeout=seconds)
        assert self.ranks() == [], "no rank is left behind"
        return str(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("signals")
    run = Run(write_run_file(folder), folder / "out")
    yield run
    if run.process is not None and run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGKILL)


@pytest.mark.fault("stop signal while loading, in the first step or during validation")
def test_a_signal_to_one_rank_while_the_base_is_loaded(run: Run) -> None:
    """The other rank loses its connection, which is not reported as an error."""
    run.start()
    run.until(lambda: len(run.ranks()) == 2)
    run.ranks()[1].send_signal(signal.SIGTERM)
    output = run.end(60)
    assert run.process.returncode == 75, output
    assert "Rerun the command to start over." in output
    assert "error" not in output
    assert not (run.output / "checkpoints").exists()


@pytest.mark.fault("SIGTERM to one rank only")
@pytest.mark.fault("second signal while the checkpoint is saved")
def test_a_signal_to_one_rank_saves_and_stops_all(run: Run) -> None:
    run.start()
    run.until(lambda: run.steps() >= 2)
    second = run.ranks()[1]
    for _ in range(2):
        second.send_signal(signal.SIGTERM)
    output = run.end(90)
    assert run.process.returncode == 75, output
    (saved,) = (run.output / "checkpoints").glob("step-*")
    assert f"Rerun the command to resume from {saved.name}." in output
    assert 2 <= int(saved.name.removeprefix("step-")) < STEPS


@pytest.mark.fault("rank killed (SIGKILL) during a step")
@pytest.mark.fault("rank suspended (SIGSTOP)")
def test_lost_ranks_are_named_and_restarts_are_bounded(run: Run) -> None:
    """Rank 1 is killed and the run restarts; then rank 0, which holds the store, is suspended."""
    before = run.steps()
    run.start("checkpoint.every=1", f"engine.silence_seconds={SILENCE}", "--max-restarts=1")
    run.until(lambda: run.steps() > before + 1)
    first = run.ranks()
    first[1].kill()
    killed = time.monotonic()
    run.until(lambda: not any(rank.is_running() for rank in first))
    assert time.monotonic() - killed < 30
    began = run.steps()
    run.until(lambda: len(run.ranks()) == 2 and run.steps() > began)
    run.ranks()[0].suspend()
    output = run.end(SILENCE + 75)
    assert run.process.returncode == 1, output
    assert "rank 1 (process " in output
    assert "was killed by SIGKILL" in output
    assert re.search(r"failed at step \d+; restart 1 of 1: the run resumes from step-\d+", output)
    hung = rf"rank 0( on \S+)? stopped responding {SILENCE} s ago"
    assert re.search(hung + r".*; rank 1 is waiting in [^(]+ \(step \d+, collective \d+", output)
    assert "still failing after 1 restarts" in output


@pytest.mark.fault("rank killed (SIGKILL) during a step")
def test_the_resumed_run_equals_an_uninterrupted_one(run: Run, tmp_path: Path) -> None:
    run.start()
    output = run.end(200)
    assert run.process.returncode == 0, output
    alone = tmp_path / "alone"
    done = one_process("trainer", run._words[1], f"output_dir={alone}", *WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line)["step"] for line in (run.output / "metrics.jsonl").open()]
    assert set(range(1, STEPS + 1)) <= set(steps)
    for adapter in sorted((alone / "prompts").glob("*/last/adapter_model.safetensors")):
        expected = load_file(adapter)["prompt_embeddings"]
        actual = load_file(run.output / adapter.relative_to(alone))["prompt_embeddings"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
