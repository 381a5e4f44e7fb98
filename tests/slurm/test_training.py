"""A run on a real Slurm that loses its node, its time and its job ends equal to one that did not.

One job on two nodes, one rank each, over an int8 base that ZeRO-3 shards. Its time limit comes
near, a node goes down, it receives a stop signal, it is cancelled and submitted again. A second
run, of slurm/cpu-smoke-test.sbatch, has the same settings and is not interrupted.
"""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from slurm.render import EXAMPLES
from tests.slurm.cluster import NODES
from tests.slurm.conftest import ROOT, Desk, alive_in, nothing_left_of, read, until
from trainer.config import dump, load

pytestmark = pytest.mark.timeout(900)

START_SECONDS = 300  # until a run has a new checkpoint, on a busy machine
#: More than is left after the time limit is cut: Slurm's next check, twice a minute, then signals.
SIGNAL_SECONDS = 150
OUTPUT = Path("runs", "often stopped")
(SMOKE,) = EXAMPLES["cpu-smoke-test"].tasks


class Run:
    """The job that is interrupted repeatedly."""

    def __init__(self, desk: Desk, run_file: Path) -> None:
        self.desk, self.run_file = desk, run_file
        self.output = desk.path / OUTPUT
        self.job = self.submit()
        self.log = self.output / "logs" / f"slurm-{self.job}.out"

    def submit(self) -> str:
        stdout = self.desk.promptshard(
            *("submit", str(self.run_file), "--nodes", "2", "--time", "15"),
            *("--signal-seconds", str(SIGNAL_SECONDS), "--max-requeues", "5"),
            f"output_dir={OUTPUT}",
        )
        return stdout.split("submitted job ")[1].split(":")[0]

    @property
    def saved(self) -> int:
        names = [path.name for path in (self.output / "checkpoints").glob("step-*")]
        return max((int(name.rpartition("-")[2]) for name in names), default=0)

    def logs(self) -> str:
        logs = [
            self.log,
            *(self.output / "logs").glob("*.log"),
            *self.desk.path.glob("slurm-*.out"),
        ]
        return "\n".join(f"{path.name}:\n{read(path)[-3000:]}" for path in logs)

    @contextmanager
    def held(self, restart: int) -> Iterator[list[psutil.Process]]:
        """Suspend one rank after this session has saved, so that the run cannot end early."""
        until(lambda: f"restart {restart}, port" in read(self.log), START_SECONDS, self.logs)
        before = self.saved
        until(lambda: self.saved > before, START_SECONDS, self.logs)
        processes = map(psutil.Process, alive_in(self.job))
        ranks = [rank for rank in processes if rank.cmdline()[1:2] == ["-u"]]
        assert len(ranks) == 2, [rank.cmdline() for rank in ranks]
        ranks[0].send_signal(signal.SIGSTOP)
        try:
            yield ranks
        finally:
            ranks[0].send_signal(signal.SIGCONT)
            psutil.wait_procs(ranks, timeout=60)

    def finish(self) -> None:
        until(lambda: not self.desk.cluster.squeue(), START_SECONDS, self.logs)
        summary = self.output / "summary.json"
        assert json.loads(summary.read_text())["status"] == "finished", self.logs()

    def status(self) -> Any:
        return json.loads(self.desk.promptshard("status", str(OUTPUT), "--json"))


@pytest.fixture(scope="module")
def run(desk: Desk) -> Run:
    """Run both to the end and check each interruption."""
    cluster = desk.cluster
    run_file = desk.path / "own.yaml"
    patient = "engine.silence_seconds=600"  # ranks are held here for longer than the default
    run_file.write_text(dump(load(SMOKE[0], [*SMOKE[1:], patient])))
    run = Run(desk, run_file)
    words = run_file.read_text()
    run_file.write_text("what a job runs was frozen when it was submitted")

    with run.held(restart=0) as ranks:
        code = Path(ranks[1].cmdline()[2])
        assert code.is_relative_to(run.output / "logs" / "submitted")
        assert (run.status()["state"], run.status()["steps"]) == ("running", 30)
        desk.sbatch(ROOT / "slurm" / "cpu-smoke-test.sbatch")
        limit = int(run_seconds(cluster.job(run.job)["RunTime"]) + 65) // 60 + 1
        cluster.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit}")
        until(lambda: "the time limit is near" in read(run.log), 120, run.logs)
        cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=15")
    until(lambda: "requeued as restart 1 of at most 5" in read(run.log), 60, run.logs)

    with run.held(restart=1):
        smoke = desk.path / "runs" / "smoke" / "summary.json"
        until(smoke.exists, START_SECONDS, run.logs)  # the other job must not lose its node
        assert json.loads(smoke.read_text())["status"] == "finished", smoke.read_text() + run.logs()
        down = f"NodeName={NODES[1]}"
        cluster.run("scontrol", "update", down, "State=DOWN", "Reason=test")
    until(lambda: cluster.job(run.job)["Restarts"] == "2", 60, run.logs)
    assert "requeued as restart 2" not in read(run.log)  # Slurm has done it itself
    cluster.run("scontrol", "update", down, "State=RESUME", check=False)

    with run.held(restart=2):
        cluster.run("scancel", "--signal=USR1", run.job)
    until(lambda: "requeued as restart 3 of at most 5" in read(run.log), 60, run.logs)

    with run.held(restart=3):
        cluster.run("scancel", run.job)
    until(lambda: cluster.job(run.job)["JobState"] == "CANCELLED", 60, run.logs)
    until(lambda: run.job not in cluster.squeue(), 60, run.logs)
    report = run.status()
    assert report["state"] in ("stopped", "dead")
    assert report["job"]["state"] in ("CANCELLED", "UNKNOWN")
    assert 0 < run.saved < 30
    assert nothing_left_of(run.job)

    run_file.write_text(words)
    run.job = run.submit()
    run.finish()
    return run


def run_seconds(text: str) -> int:
    """Parse scontrol's ``HH:MM:SS`` into seconds."""
    hours, minutes, seconds = map(int, text.split(":"))
    return (hours * 60 + minutes) * 60 + seconds


def adapters(output: Path) -> dict[str, Any]:
    tensors = {
        path.parent.relative_to(output).as_posix(): load_file(path)["prompt_embeddings"]
        for path in output.glob("prompts/**/adapter_model.safetensors")
    }
    assert len(tensors) == 4, tensors.keys()  # two prompts, each the best and the last
    return tensors


def losses(output: Path) -> dict[tuple[int, str, str], float]:
    """Return every loss and score of every step; each must be logged once."""
    by_step: dict[tuple[int, str, str], float] = {}
    for text in (output / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in line["metrics"].items():
            if line["prompt"] is not None:
                assert (line["step"], line["prompt"], name) not in by_step
                by_step[line["step"], line["prompt"], name] = value
    return by_step


@pytest.mark.fault("SIGUSR1 to the batch shell before the time limit")
def test_a_run_that_was_stopped_four_times_equals_one_that_was_not(run: Run) -> None:
    smoke = run.desk.path / "runs" / "smoke"
    assert json.loads((smoke / "summary.json").read_text())["world_size"] == 2
    mine, undisturbed = adapters(run.output), adapters(smoke)
    for name, tensor in undisturbed.items():
        assert mine[name] == pytest.approx(tensor, abs=1e-5), name
    mine, undisturbed = losses(run.output), losses(smoke)
    assert {step for step, _, _ in mine} == set(range(1, 31))
    assert mine == pytest.approx(undisturbed, rel=1e-4, abs=1e-5)


@pytest.mark.fault("two ranks requeued")
def test_it_is_one_run_of_mlflow_with_one_run_per_prompt(run: Run) -> None:
    name = run.output.name
    mine = f"select * from runs where name = '{name}' or name like '{name} / %'"
    with sqlite3.connect(run.desk.path / "mlflow.db") as store:  # of all runs from that folder
        runs = dict(store.execute(f"select run_uuid, status from ({mine})"))
        tags = store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'")
        parents = {run: parent for run, parent in tags if run in runs}
    assert set(runs.values()) == {"FINISHED"}, runs
    (parent,) = runs.keys() - parents.keys()
    assert len(runs) == 3
    assert set(parents.values()) == {parent}


@pytest.mark.fault("SIGUSR1 to the batch shell before the time limit")
def test_every_session_reports_what_it_did(run: Run) -> None:
    text = read(run.log)
    for words in ("resuming from step", "stopped and saved; submit it again to resume, unless"):
        assert words in text
    assert "not the one frozen" not in text
    assert "ended with exit code 0" in read(run.output / "logs" / f"slurm-{run.job}.out")


def test_its_status_after_the_end(run: Run) -> None:
    report = run.status()
    assert (report["state"], report["step"], report["steps"]) == ("finished", 30, 30)
    assert set(report["metrics"]) == {"triage", "animals"}
    assert report["eta_seconds"] is None
    assert "finished at step 30" in run.desk.promptshard("status", str(OUTPUT))


def test_nothing_is_left_running(run: Run) -> None:
    assert nothing_left_of(run.job)
