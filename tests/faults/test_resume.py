"""Killed runs that resume, also on another number of ranks, give the same losses."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.launcher_command import free_port
from tests import preloaded
from tests.distributed.conftest import run_module
from tests.distributed.test_run import lines, promptshard, summary, write_run_file
from tests.unit.run_folder import save_checkpoint
from tests.unit.test_checkpoint import flip_a_bit, truncate
from trainer.checkpointing import checkpoint
from trainer.checkpointing.run_lock import LOCK, acquire
from trainer.runtime.errors import EXIT_BAD_INPUT
from trainer.tracking import MetricsLog, TrackingClient
from trainer.tracking.metrics_callback import MetricsCallback
from trainer.tracking.progress_file import ProgressFile
from trainer.training.callbacks import Metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 6, 2
SHORT = [f"training.steps={STEPS}", f"checkpoint.every={EVERY}", "evaluation.every=3"]
SHORT += ["evaluation.early_stopping.patience=5"]


class Runs:
    """Runs of one run file, each with its own output folder and a log of the rows it read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, write_run_file(folder)

    def words(self, name: str, where: str = "never") -> list[str]:
        notes = self.folder / f"{name}.jsonl"
        program = ["tests.faults.watched", str(notes), where]
        return [*program, str(self.file), f"output_dir={self.folder / name}", *SHORT]

    def start(
        self, name: str, *overrides: str, where: str = "never", mlflow: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run on one rank."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SLURM_"))}
        environ = kept | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        words = [*self.words(name, where), *overrides]
        return preloaded.run(*words, environ=environ, timeout=300, mlflow=mlflow)

    def copy(self, source: str, name: str, *left_out: int) -> Path:
        """Copy an output folder without these checkpoints and without the final results."""
        output = self.folder / name
        shutil.copytree(
            self.folder / source,
            output,
            ignore=shutil.ignore_patterns(*(f"step-{s:08d}" for s in left_out)),
        )
        for file in ("summary.json", "tracking.json"):
            (output / file).unlink(missing_ok=True)
        return output

    def notes(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").open()]

    def rows(self, name: str) -> dict[int, list[list[int]]]:
        """Rows by step, as (prompt, row); of a repeated step, those of the second time."""
        return {note["step"]: note["rows"] for note in self.notes(name) if "step" in note}

    def losses(self, name: str) -> dict[tuple[int, str, str], float]:
        return {
            (line["step"], line["prompt"], key): value
            for line in lines(self.folder / name)
            for key, value in line["metrics"].items()
            if line["prompt"] is not None
        }

    def end(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the last checkpoint without its timings."""
        path = self.folder / name / f"checkpoints/step-{STEPS:08d}"
        state = json.loads((path / "state.json").read_text())
        for clock in ("train_seconds", "data_wait_seconds", "phase_seconds", "rank_seconds"):
            del state["loop"]["progress"][clock]
        return load_file(path / "state.safetensors"), state


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the runs, with one uninterrupted run named ``whole``."""
    runs = Runs(tmp_path_factory.mktemp("resume"))
    done = runs.start("whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.fixture(scope="module")
def killed(runs: Runs) -> subprocess.CompletedProcess[str]:
    """Kill a run (SIGKILL) in the second packed batch of step 5 and rerun the command at once."""
    killed = runs.start("killed", where="5:2", mlflow=True)
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert (runs.folder / "killed" / LOCK).exists()
    return runs.start("killed", mlflow=True)


@pytest.mark.fault("base weights change or receive gradients")
def test_the_base_is_unchanged_and_only_prompts_have_gradients(runs: Runs) -> None:
    seen = [note for note in runs.notes("whole") if "digest" in note]
    assert len(seen) == STEPS + 2
    assert len({note["digest"] for note in seen}) == 1
    assert {note["trainable"] for note in seen} == {0}
    assert {note["with_gradient"] for note in seen} == {0}
    first = load_file(runs.folder / "whole/checkpoints/step-00000002/state.safetensors")
    last, _ = runs.end("whole")
    for name in ("soft", "mlp", "prefix"):
        encoder = [key for key in last if key.startswith(f"{name}/encoder/")]
        assert any(not torch.equal(first[key], last[key]) for key in encoder), name


@pytest.mark.fault("resume in mid-epoch and mid-accumulation")
def test_a_killed_run_resumes_equal_to_an_uninterrupted_one(runs: Runs, killed: Any) -> None:
    """Three prompts, in mid-epoch and mid-accumulation: bit-equal."""
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert f"resuming from step 4/{STEPS}" in killed.stdout
    steps = [note for note in runs.notes("whole") if "step" in note]
    assert all(note["batches"] > 2 for note in steps), "nothing is accumulated here"
    assert all(cursor["epoch"] == 0 for cursor in runs.end("whole")[1]["loop"]["feed"])
    assert runs.rows("killed") == runs.rows("whole")
    counts = Counter((step, *row) for step, rows in runs.rows("killed").items() for row in rows)
    assert max(Counter((k, row) for _, k, row in counts).values()) == 1, "a row was read twice"

    assert runs.losses("killed") == runs.losses("whole")
    (tensors, state), (expected, expected_state) = runs.end("killed"), runs.end("whole")
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    for name in ("soft", "mlp", "prefix"):
        adapters = [
            runs.folder / run / "prompts" / name / "adapter_model.safetensors"
            for run in ("killed", "whole")
        ]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.fault("two jobs on one output folder")
def test_the_lock_of_the_killed_run_is_taken_over_and_released(runs: Runs, killed: Any) -> None:
    assert "was taken over from process" in killed.stdout
    assert "that process is gone" in killed.stdout
    assert not (runs.folder / "killed" / LOCK).exists()


def test_a_copy_of_the_killed_run_gets_an_mlflow_run_of_its_own(runs: Runs, killed: Any) -> None:
    source, output = runs.folder / "killed", runs.folder / "copied"
    left_out = shutil.ignore_patterns(f"step-{STEPS:08d}", "summary.json")
    shutil.copytree(source, output, ignore=left_out)
    before = ProgressFile(source).output_id
    assert ProgressFile(output).output_id == before
    done = runs.start("copied")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ProgressFile(source).output_id == before
    assert ProgressFile(output).output_id != before


def test_a_finished_run_without_checkpoints_refuses_other_settings(runs: Runs) -> None:
    shutil.copytree(
        runs.folder / "whole", runs.folder / "pruned", ignore=shutil.ignore_patterns("step-*")
    )
    done = runs.start("pruned", "training.steps=9")
    assert done.returncode == EXIT_BAD_INPUT, done.stdout + done.stderr
    assert "started with" in done.stderr
    assert runs.start("pruned").returncode == 0


def test_curves_of_the_killed_run_have_no_gaps_or_duplicates(runs: Runs, killed: Any) -> None:
    mine = "select * from runs where name = 'killed' or name like 'killed / %'"
    with sqlite3.connect(runs.folder / "mlflow.db") as store:
        (parents,) = store.execute(
            f"select count(*) from ({mine}) where run_uuid not in "
            "(select run_uuid from tags where key = 'mlflow.parentRunId')"
        )
        points = store.execute(
            f"select name, step from metrics join ({mine}) using (run_uuid) "
            "where key = 'train_loss'"
        ).fetchall()
        (status,) = store.execute(f"select distinct status from ({mine})")
    assert (parents[0], status[0]) == (1, "FINISHED")
    steps = Counter(points)
    assert len(steps) == 3 * STEPS
    assert set(steps.values()) == {1}


def test_checkpoints_do_not_delay_steps(runs: Runs) -> None:
    written = summary(runs.folder / "whole")["checkpoints"]
    assert written["written"] + written["replaced_by_newer"] == STEPS // EVERY
    assert written["failed"] == {}
    assert 0 < written["share_of_step_time"] < 0.1  # of steps that take milliseconds


@pytest.fixture(scope="module")
def two_ranks(runs: Runs) -> str:
    """Resume from step 2 on two ranks: newer checkpoints are damaged, the pointer is garbled."""
    output = runs.copy("whole", "two")
    truncate(output / f"checkpoints/step-{STEPS:08d}/state.safetensors")
    flip_a_bit(output / "checkpoints/step-00000004/state.safetensors")
    (output / "checkpoints" / "latest").write_bytes(b"\xff{")
    logs = [runs.folder / f"two-{rank}.log" for rank in range(2)]
    codes = run_module(*runs.words("two"), logs=logs)
    assert codes == [0, 0], [log.read_text() for log in logs]
    return logs[0].read_text()


@pytest.mark.fault("newest checkpoint is truncated")
@pytest.mark.fault("bit flipped in a checkpoint")
@pytest.mark.fault("pointer to the newest checkpoint is missing or garbled")
def test_damaged_checkpoints_are_skipped_with_a_warning(two_ranks: str) -> None:
    for step, why in ((STEPS, "state.safetensors: has"), (4, "its sha256 differs")):
        (line,) = [
            text for text in two_ranks.splitlines() if f"step-{step:08d}: " in text and why in text
        ]
        assert line.startswith("warning: checkpoint skipped")
    assert f"resuming from step 2/{STEPS}" in two_ranks


@pytest.mark.fault("resume on another number of ranks")
def test_a_run_on_one_rank_resumes_on_two(runs: Runs, two_ranks: str) -> None:
    check_same_course(runs, "two", after=2)


def check_same_course(runs: Runs, name: str, after: int) -> None:
    """Assert the same rows in the same order, and losses that differ by rounding only."""
    expected = {step: rows for step, rows in runs.rows("whole").items() if step > after}
    assert runs.rows(name) == expected
    losses, expected_losses = runs.losses(name), runs.losses("whole")
    assert losses.keys() == expected_losses.keys()
    for key, loss in expected_losses.items():
        if key[2].endswith("_loss"):
            assert losses[key] == pytest.approx(loss, abs=1e-3), key


@pytest.fixture
def small_disk(runs: Runs, two_ranks: str) -> Iterator[Path]:
    """A copy of ``two`` as of step 4 whose checkpoint folder is on a full disk."""
    output = runs.copy("two", "one", STEPS)
    held = runs.folder / "held"
    (output / "checkpoints").rename(held)
    (output / "checkpoints").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(output / "checkpoints")]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a full disk needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        shutil.copytree(held, output / "checkpoints", dirs_exist_ok=True)
        fill(output / "checkpoints" / "filler")
        yield output
    finally:
        subprocess.run(["umount", str(output / "checkpoints")], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return


@pytest.mark.fault("disk full")
@pytest.mark.fault("resume on another number of ranks")
def test_a_run_on_two_ranks_resumes_on_one_with_a_full_disk(runs: Runs, small_disk: Path) -> None:
    done = runs.start("one", "training.micro_batch_tokens=450")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming from step 4/{STEPS}" in done.stdout
    check_same_course(runs, "one", after=4)

    (warning,) = [line for line in done.stderr.splitlines() if "no checkpoint written" in line]
    assert warning.startswith(f"warning: step {STEPS}: no checkpoint written: [Errno 28]")
    assert list(summary(small_disk)["checkpoints"]["failed"]) == [str(STEPS)]
    folder = small_disk / "checkpoints"
    saved = checkpoint.newest(folder)
    assert saved is not None
    assert saved.step == 4, "the one before is whole"
    (folder / "filler").unlink()
    save_checkpoint(folder, STEPS, saved.tensors, saved.state, 3)  # there is room again
    saved = checkpoint.newest(folder)
    assert saved is not None
    assert saved.step == STEPS


def test_a_run_killed_before_its_report_is_completed_on_rerun(runs: Runs) -> None:
    output = runs.folder / "late"
    shutil.copytree(runs.folder / "whole", output)
    (output / "report.html").unlink()
    done = runs.start("late", mlflow=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "already holds this finished run" in done.stdout
    assert "curves:  mlflow ui" in done.stdout
    assert "</html>" in (output / "report.html").read_text()
    with sqlite3.connect(runs.folder / "mlflow.db") as store:
        ends = store.execute("select status from runs where name like 'late%'").fetchall()
    assert ends == [("FINISHED",)] * 4


def test_a_repeated_validation_is_logged_once(runs: Runs) -> None:
    """The run was stopped during validation, resumed, and killed after logging it."""
    output = runs.copy("whole", "repeated")
    folder = output / "checkpoints"
    saved = checkpoint.newest(folder)
    assert saved is not None
    tensors = {key: x for key, x in saved.tensors.items() if not key.endswith("/stopped")}
    saved.state["loop"]["progress"] |= {"unjudged": True, "stopped": {}}
    for prompt in saved.state["bank"]["prompts"].values():
        prompt["active"] = True
    save_checkpoint(folder, saved.step, tensors, saved.state, 9)
    done = runs.start("repeated")
    assert done.returncode == 0, done.stdout + done.stderr
    points = Counter(
        (line["step"], line["prompt"], name) for line in lines(output) for name in line["metrics"]
    )
    assert {name for (step, _, name) in points if step == STEPS} >= {"validation_loss"}
    assert set(points.values()) == {1}


def test_a_run_whose_folder_was_moved_stops_and_resumes_completely(runs: Runs) -> None:
    output, steps = runs.folder / "moved", 30
    words = [f"training.steps={steps}", "evaluation.every=1000", "checkpoint.every=1000"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SLURM_"))}
    environ = kept | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    log = runs.folder / "moved.log"
    process = preloaded.start(
        *runs.words("moved"), *words, environ=environ, stdout=log, stderr=None, mlflow=True
    )
    deadline = time.monotonic() + 400
    while not (metrics := output / "metrics.jsonl").exists() or not metrics.stat().st_size:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    output.rename(runs.folder / "elsewhere")
    code, text = process.wait(150), log.read_text()
    assert code == 1, text
    assert f"output_dir {output} was moved or deleted while the run was writing to it" in text
    assert "and all metrics were written to a new" in text
    again = runs.start("moved", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    counts = Counter((line["step"], line["prompt"]) for line in lines(output) if line["step"])
    assert {step for step, _ in counts} == set(range(1, steps + 1))
    assert all(count == 1 for (step, _), count in counts.items() if step < steps)


@pytest.mark.fault("disk full")
def test_a_full_disk_under_the_metrics_log_is_reported_once(tmp_path: Path) -> None:
    """The metrics of a step are lost on a full disk; the run continues."""
    messages: list[str] = []
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    client = TrackingClient(tmp_path)
    callback = MetricsCallback(MetricsLog(tmp_path), client, messages.append)
    for step in (1, 2, 3):
        callback.on_validation_end([Metrics(step, 10, {"train_loss": 1.0})])
    (warning,) = messages
    assert warning.startswith("step 1: ")
    assert warning.endswith("No space left on device; training continues")


@pytest.mark.fault("two jobs on one output folder")
@pytest.mark.parametrize("command", ["promptshard", "a rank"])
def test_a_second_job_on_the_folder_is_refused(runs: Runs, command: str) -> None:
    output = runs.folder / "whole"
    before = {path: path.stat().st_mtime_ns for path in output.iterdir() if path.name != "logs"}
    held = acquire(output, print)
    try:
        if command == "promptshard":
            done = promptshard("train", str(runs.file), f"output_dir={output}", "--fresh")
        else:
            done = runs.start("whole", "--fresh")
    finally:
        held.release()
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "in use by" in line]
    assert f"in use by process {os.getpid()} on {held.holder.host} since 20" in line
    assert "give another output_dir" in line
    after = {path: path.stat().st_mtime_ns for path in output.iterdir() if path.name != "logs"}
    assert before == after
