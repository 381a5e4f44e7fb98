"""``promptshard status`` and ``promptshard list``: every state, damaged folders, and --watch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import run_list, run_metrics, slurm_queue, status, status_text, status_watch
from launch.run_state import PromptStatus, Status
from tests.unit import run_folder
from tests.unit.test_launch import promptshard as run_promptshard
from tests.unit.test_launch import run_file  # noqa: F401
from trainer.checkpointing import run_lock
from trainer.checkpointing.run_lock import LOCK, Holder
from trainer.runtime.errors import BadInput


def write_run(folder: Path, run: str, steps: int, every: float = 2.0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(run)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"time": 1000 + every * step, "step": step, "useful_tokens": 1}
            line |= {"prompt": "triage", "metrics": {"train_loss": 1 / step}}
            file.write(json.dumps(line) + "\n")


def test_status_without_slurm(run_file, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PATH", "")
    out = run_file.parent / "out"
    write_run(out, run_file.read_text(), 3)
    (out / "checkpoints" / "step-00000002").mkdir(parents=True)
    report = status.read_status(out)
    assert (report.state, report.step, report.steps, report.checkpoint) == ("stopped", 3, 5, 2)
    assert report.eta_seconds is None
    text = status_text.as_text(report, now=1016.0)
    assert text.startswith(f"{out}: stopped; rerun the command to resume from step 2\n")
    assert "step: 3 of 5 (60%)\n" in text
    assert "last metrics: 10 s ago" in text
    assert "checkpoint: step 2" in text
    assert text.endswith("triage  3/5   0.3333      –")


def test_status_of_a_run_that_runs_here(run_file, monkeypatch):  # noqa: F811
    """Also of one that was resumed after it had failed."""
    monkeypatch.setenv("PATH", "")
    out = run_file.parent / "out"
    write_run(out, run_file.read_text(), 3)
    (out / "summary.json").write_text('{"status": "failed", "error": "x"}')
    held = run_lock.acquire(out, print)
    try:
        report = status.read_status(out)
        assert (report.state, report.eta_seconds) == ("running", pytest.approx(4.0))
        assert report.description.startswith(f"running: process {os.getpid()} on ")
        assert "step: 3 of 5 (60%), about 4 s left" in status_text.as_text(report)
    finally:
        held.release()
    assert status.read_status(out).state == "failed"


JUNK = ["[]", "null", "7", '"x"', "{", "", "[" * 100_000, '{"a": "\\ud800"}', "\0\xff", "NaN"]
#: Files of an output folder, and values of a wrong kind in them.
ODD = {
    "summary.json": [
        '{"status": []}',
        '{"status": "finished", "steps": Infinity}',
        '{"prompts": []}',
        '{"prompts": {"a": 3}}',
        '{"prompts": {"a": {"stopped": 7}}}',
        '{"status": "failed", "error": {"x": 1}}',
    ],
    "metrics.jsonl": [
        '{"time": 1, "step": Infinity, "metrics": {}}\n',
        '{"time": NaN, "step": 1, "metrics": {}}\n',
        '{"time": 1e308, "step": 1, "metrics": {}}\n{"time": -1e308, "step": 2, "metrics": {}}\n',
        '{"time": 1, "step": 1, "prompt": ["a"], "metrics": {}}\n',
        '{"time": 1, "step": 1, "prompt": "a", "metrics": []}\n',
        '{"time": 1, "step": -9, "prompt": "a", "metrics": {"validation_x": 1e999}}\n',
    ],
    "run.lock": [
        '{"pid": "x"}',
        json.dumps(dict.fromkeys(Holder.__dataclass_fields__, 1)),
        json.dumps(dict.fromkeys(Holder.__dataclass_fields__, "x")),
        json.dumps(dict.fromkeys(Holder.__dataclass_fields__)),
    ],
    "logs/submitted/1/job.json": [
        '{"job": 3, "tasks": "abc"}',
        '{"job": "3", "tasks": [1, {}]}',
        '{"job": "3", "tasks": ["a\\u0000b", "c"]}',
        '{"job": "3", "tasks": ["' + "x" * 5000 + '", "c"]}',
    ],
    "checkpoints": [""],
    "logs": [""],
}


def test_status_of_damaged_folders(run_file, monkeypatch):  # noqa: F811
    """Each file is damaged, a folder, a link to itself, or there and not readable as text."""
    monkeypatch.setenv("PATH", "")
    out = run_file.parent / "out"
    for name, values in ODD.items():
        for content in [*values, *JUNK, None, "loop"]:
            shutil.rmtree(out, ignore_errors=True)
            write_run(out, run_file.read_text(), 3)
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if content is None:
                path.mkdir()
            elif content == "loop":
                path.symlink_to(path)
            else:
                path.write_text(content, encoding="utf-8", errors="surrogateescape")
            try:
                report = status.read_status(out)
            except BadInput:
                continue
            assert report.state in ("stopped", "dead", "running", "finished", "failed", "array")
            json.loads(status_text.list_json([report]))
            status_text.as_list([report])
            status_text.as_text(report)
            json.loads(status_text.as_json(report))
    for name in ("step-x", "step-", "step-00000001.tmp", "step-\u0663"):
        (out / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
    assert status.read_status(out).checkpoint is None


def test_status_prints_nothing_that_controls_a_terminal(run_file, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PATH", "")
    out = run_file.parent / "out"
    write_run(out, run_file.read_text(), 1)
    evil = "\x1b]0;title\x07\x9b31m\u202e http://me:secret@host"
    line = {"time": 1, "step": 1, "prompt": evil, "metrics": {f"validation_{evil}": 1.0}}
    (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (out / "summary.json").write_text(json.dumps({"status": "failed", "error": evil}))
    for words in ([], ["--json"]):
        done = run_promptshard("status", out, *words)
        assert done.returncode == 0, done.stderr
        assert not set("\x1b\x07\x9b\u202e") & set(done.stdout)
    assert "\\x1b]0;title" in status_text.as_text(status.read_status(out))
    assert "secret" not in status_text.as_text(status.read_status(out))


@pytest.mark.parametrize(
    ("summary", "state", "text"),
    [
        ({"status": "finished", "steps": 5}, "finished", "finished at step 5"),
        ({"status": "failed", "error": "out of memory"}, "failed", "failed: out of memory"),
    ],
)
def test_status_of_a_run_that_ended(run_file, monkeypatch, summary, state, text):  # noqa: F811
    monkeypatch.setenv("PATH", "")
    out = run_file.parent / "out"
    write_run(out, run_file.read_text(), 5)
    (out / "summary.json").write_text(json.dumps(summary))
    report = status.read_status(out)
    assert (report.state, report.eta_seconds) == (state, None)
    assert report.description.startswith(text)


def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str) -> None:
    """Put programs first on PATH that print these lines, and append their names to ``calls``."""
    for name, answer in (("squeue", squeue), ("sacct", sacct)):
        script = f"echo {name} >> {folder}/calls\nprintf '%s\\n' '{answer}'\n"
        (folder / name).write_text(f'#!/bin/sh\n[ -z "$SQUEUE_PARTITION" ] || exit 0\n{script}')
        (folder / name).chmod(0o755)
    if str(folder) not in os.environ["PATH"].split(os.pathsep):
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def submitted(run_file: Path, out: Path, *tasks: Path) -> Path:  # noqa: F811
    """Write the record of job 12 for an output folder, before the run has saved its own files."""
    folder = out / "logs" / "submitted" / "20260101-000000"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(run_file.read_text())
    record = {"job": "12", "tasks": [str(task) for task in tasks or (out,)]}
    (folder / "job.json").write_text(json.dumps(record))
    return out


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "text"),
    [
        ("12|RUNNING|None|n[1-2]|1:00:00", "", "running", "running on n[1-2]"),
        ("CLUSTER: a\n12|RUNNING|None|n1|1:00:00", "", "running", "running on n1"),
        ("12|PENDING|Priority||1:00:00", "", "waiting", "pending (Priority)"),
        ("12|COMPLETING|None|n1|1:00:00", "", "running", "Slurm job 12 is completing"),
        ("", "12|TIMEOUT|0:0|n1", "stopped", "job 12 ended: TIMEOUT (exit code 0:0)"),
        ("", "12|CANCELLED by 0|0:15|n1", "stopped", "job 12 ended: CANCELLED"),
        ("", "", "stopped", "stopped; rerun the command to start over"),
    ],
)
def test_status_asks_slurm(run_file, monkeypatch, tmp_path, squeue, sacct, state, text):  # noqa: F811
    stand_ins(tmp_path, monkeypatch, squeue, sacct)
    out = submitted(run_file, run_file.parent / "out")
    report = status.read_status(out)
    assert (report.state, report.step, report.steps) == (state, 0, 5)
    assert text in report.description


def test_a_finished_run_whose_job_is_completing(run_file, monkeypatch, tmp_path):  # noqa: F811
    """Slurm may wait for a node for long after the run has ended."""
    stand_ins(tmp_path, monkeypatch, "12|COMPLETING|None|n1|1:00:00", "")
    out = submitted(run_file, run_file.parent / "out")
    for name in ("finished", "failed"):
        (out / "summary.json").write_text(json.dumps({"status": name, "error": "x"}))
        assert status.read_status(out).state == name


def test_a_run_whose_next_job_waits_for_it(run_file, monkeypatch, tmp_path):  # noqa: F811
    out = submitted(run_file, run_file.parent / "out")
    write_run(out, run_file.read_text(), 3)
    stand_ins(tmp_path, monkeypatch, "12|PENDING|Dependency||1:00:00", "")
    assert status.read_status(out).state == "waiting"
    leave_lock(out, host="elsewhere", job="11")
    report = status.read_status(out)
    assert "of Slurm job 11" in report.description
    assert (report.state, report.eta_seconds) == ("running", pytest.approx(4.0))
    stand_ins(tmp_path, monkeypatch, "12|PENDING|BeginTime||1:00:00", "")  # requeued
    assert status.read_status(out).state == "waiting"


def test_the_last_known_state_of_a_job_counts_if_slurm_does_not_answer(
    run_file,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    monkeypatch.setattr(status, "SLURM_INTERVAL", 0.0)
    monkeypatch.setenv("SQUEUE_PARTITION", "of other jobs")
    out = submitted(run_file, run_file.parent / "out")
    reader = status.StatusReader(out)
    silent = "#!/bin/sh\necho 'slurm_load_jobs error: Socket timed out' >&2\nexit 1\n"
    stand_ins(tmp_path, monkeypatch, "12|PENDING|Priority||1:00:00", "")
    assert reader.read().state == "waiting"
    for name in ("squeue", "sacct"):
        (tmp_path / name).write_text(silent)
    assert reader.read().state == "waiting"
    assert status.read_status(out).state == "stopped"  # nothing is known
    stand_ins(tmp_path, monkeypatch, "", "12|PENDING|None|")
    (tmp_path / "squeue").write_text(silent)
    assert status.read_status(out).state == "waiting"
    assert slurm_queue.query_jobs("12\0") is None  # of a damaged record
    unknown = silent.replace("Socket timed out", "Invalid job id specified")
    stand_ins(tmp_path, monkeypatch, "", "")
    (tmp_path / "squeue").write_text(unknown)
    assert reader.read().state == "stopped"


def test_one_query_returns_the_states_of_all_tasks_of_an_array(
    run_file,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    out = run_file.parent / "out"
    tasks = [out / str(i) for i in range(5)]
    out.mkdir()
    for task in tasks:
        write_run(task, run_file.read_text(), 3)
    submitted(run_file, out, *tasks)
    ended = "12_0|TIMEOUT|0:0|n1\n12_1|RUNNING|0:0|n1\n12_[3-4]|CANCELLED by 7|0:0|"
    stand_ins(
        tmp_path, monkeypatch, "12_1|RUNNING|None|n1|1:00\n12_2|PENDING|Priority||1:00", ended
    )
    report = status.read_status(out)
    states = [task.job.state for task in report.tasks if task.job]
    assert states == ["TIMEOUT", "RUNNING", "PENDING", "CANCELLED", "CANCELLED"]
    assert (tmp_path / "calls").read_text().split() == ["squeue", "sacct"]
    last = slurm_queue.last_job(out)
    assert last is not None
    assert (last.id, last.state) == ("12", "RUNNING")


def test_status_of_a_folder_without_a_run(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        done = run_promptshard("status", folder)
        assert done.returncode == 2
        assert str(folder) in done.stderr


def test_pauses_do_not_count_as_step_time():
    assert run_metrics.pace([0.0, 1.0, 2.0, 3.0, 500.0, 501.0]) == 1.0
    assert run_metrics.pace([1.0]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (600, "10 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h"), (-3, "0 s")],
)
def test_durations(seconds, text):
    assert status_text.duration(seconds) == text


# States


@pytest.fixture
def out(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """An output folder with three steps and a checkpoint; no Slurm."""
    monkeypatch.setenv("PATH", "")
    folder = run_file.parent / "out"
    write_run(folder, run_file.read_text(), 3)
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    (folder / "logs").mkdir()
    environment = {"command": "deepspeed --module trainer my.yaml training.steps=5"}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def leave_lock(folder: Path, age: float = 0.0, **changes: Any) -> Holder:
    """Leave the lock of another process, last touched ``age`` seconds ago."""
    holder = dataclasses.replace(Holder.here(), **changes)
    (folder / LOCK).write_text(holder.to_json())
    os.utime(folder / LOCK, (time.time() - age,) * 2)
    return holder


def write_log(folder: Path, name: str, text: str, age: float = 0.0) -> None:
    (folder / "logs" / name).write_text(text)
    os.utime(folder / "logs" / name, (time.time() - age,) * 2)


def write_summary(folder: Path, **values: Any) -> None:
    (folder / "summary.json").write_text(json.dumps(values))


TRACEBACK = "line\n" * 30 + "Traceback (most recent call last):\n  File x\nRuntimeError: {}\n"


def test_a_stopped_run_names_the_command_that_resumes_it(out):
    report = status.read_status(out)
    assert (report.state, report.exit_code) == ("stopped", 75)
    assert report.resume == "promptshard train my.yaml training.steps=5"
    text = status_text.as_text(report)
    assert "resume: promptshard train my.yaml training.steps=5   (in the folder in wh" in text
    (out / "checkpoints" / "step-00000002").rmdir()
    text = status_text.as_text(status.read_status(out))
    assert "stopped; rerun the command to start over" in text
    assert "start over: promptshard train my.yaml" in text


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ("--hostfile 'my hosts'", " --hostfile 'my hosts'"),
        ("--hostfile hosts --no-ssh --node-rank 0", " --hostfile hosts --no-ssh --node-rank 0"),
        ("", ""),
        (None, " --processes 4"),  # of an earlier version, or started by hand
    ],
)
def test_a_run_is_resumed_with_the_options_that_started_it(out, options, added):
    environment = {"command": "deepspeed --module trainer my.yaml", "start_options": options}
    environment |= {"world_size": 4, "device": "cpu"}
    (out / "environment.json").write_text(json.dumps(environment))
    report = status.read_status(out)
    assert report.resume == f"promptshard train my.yaml{added}"
    text = status_text.as_text(report)
    assert ("; on every host, with its --node-rank)" in text) == ("--no-ssh" in added)


def test_a_moved_or_copied_run_is_resumed_in_its_own_folder(out):
    copy = out.with_name("a copy")
    shutil.copytree(out, copy)
    expected = f"promptshard train my.yaml training.steps=5 'output_dir={copy}'"
    assert status.read_status(copy).resume == expected


def test_a_run_is_resumed_without_the_option_that_would_start_it_over(out, run_file):  # noqa: F811
    folder = submitted(run_file, out) / "logs" / "submitted" / "20260101-000000"
    record = {"job": "", "tasks": [str(out)], "command": "promptshard submit my.yaml --fresh"}
    (folder / "job.json").write_text(json.dumps(record))
    assert status.read_status(out).resume == "promptshard submit my.yaml"


def test_a_run_whose_process_is_gone_is_dead(out):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    leave_lock(out, age=40, pid=child.pid, started="1")
    (out / "summary.json").write_text('{"status": "failed", "error": "an earlier start"}')
    os.utime(out / "summary.json", (time.time() - 500,) * 2)
    report = status.read_status(out)
    assert (report.state, report.exit_code) == ("dead", 1)
    assert report.description.startswith(f"dead: that process is gone (process {child.pid} on ")
    assert report.description.endswith("; rerun the command to resume from step 2")
    assert report.process is not None
    assert report.process.heartbeat_seconds == pytest.approx(40, abs=5)
    assert report.resume.startswith("promptshard train ")


@pytest.mark.parametrize(("age", "state"), [(60.0, "running"), (300.0, "dead")])
def test_on_another_host_the_heartbeat_decides(out, age, state):
    leave_lock(out, age=age, host="elsewhere", boot="x", restarts=2, job="7")
    report = status.read_status(out)
    assert report.state == state
    assert "on elsewhere of Slurm job 7 since " in report.description
    assert ", restart 2" in report.description
    text = status_text.as_text(report)
    assert ("first make sure that process" in text) == (state == "dead")


def test_a_process_without_heartbeat_is_reported(out):
    leave_lock(out, age=200)
    report = status.read_status(out)
    assert report.state == "running"
    assert "heartbeat: none for 3 min; the process is suspended" in status_text.as_text(report)


def test_a_failed_run_shows_the_log_of_the_rank_that_failed_first(out):
    (out / "summary.json").write_text(
        json.dumps({"status": "failed", "error": "Connection closed\nby http://me:pass@host"})
    )
    write_log(out, "rank-0.log", TRACEBACK.format("Connection closed"))
    write_log(out, "rank-1.log", TRACEBACK.format("\x1b[31mhttp://me:word@host"), age=5)
    write_log(out, "launcher.log", "promptshard: rank 1 (process 7 on a) ended with exit code 1\n")
    report = status.read_status(out)
    assert (report.state, report.exit_code, report.error) == ("failed", 1, "Connection closed")
    assert "; rank 1 (process 7 on a) ended with exit code 1; rerun" in report.description
    text = status_text.as_text(report)
    assert f"last lines of {out}/logs/rank-1.log:\n  line\n" in text
    assert "  RuntimeError: \\x1b[31mhttp://***@host\n" in text
    assert len(report.log.lines) == 15
    assert "word" not in text
    assert "pass" not in text
    shown = json.loads(status_text.as_json(report))
    assert shown["log"]["path"] == f"{out}/logs/rank-1.log"
    assert "word" not in status_text.as_json(report)


def test_a_killed_rank_is_the_reason_of_a_failure(out):
    (out / "summary.json").write_text('{"status": "failed", "error": "Connection closed"}')
    killed = "rank 1 (process 7 on a) was killed by SIGKILL (out of memory?)"
    write_log(out, "rank-0.log", TRACEBACK.format("Connection closed"))
    write_log(out, "launcher.log", f"chatter\npromptshard: {killed}; see the logs in x\n")
    report = status.read_status(out)
    assert report.error == killed
    assert report.description.startswith(f"failed: {killed}; rerun the command to resume")


def test_a_run_that_failed_before_the_first_step(out):
    """The run has neither run.yaml nor summary; a stop signal is not a failure."""
    shutil.rmtree(out)
    (out / "logs").mkdir(parents=True)
    write_log(out, "rank-0.log", TRACEBACK.format("no memory"))
    report = status.read_status(out)
    assert (report.state, report.steps) == ("failed", None)
    assert "failed: RuntimeError: no memory; rerun the command to start over" in report.description
    (out / "logs" / "stopped.txt").touch()
    assert status.read_status(out).state == "stopped"


def test_a_run_whose_input_the_ranks_refused_has_failed(out):
    """If an earlier start has left a checkpoint, that start can still be resumed."""
    write_log(out, "rank-0.log", "error: old\nlibrary\nerror: a.jsonl:4: has 6005 tokens\n")
    write_log(out, "launcher.log", "chatter\npromptshard: invalid input\n")
    report = status.read_status(out)
    assert report.state == "stopped"
    assert "the last start was refused: a.jsonl:4: has 6005 tokens; rerun" in report.description
    (out / "checkpoints" / "step-00000002").rmdir()
    report = status.read_status(out)
    assert (report.state, report.error) == ("failed", "a.jsonl:4: has 6005 tokens")
    assert report.log is None
    assert report.description.startswith("failed: a.jsonl:4: has 6005 tokens; rerun the command")


def test_a_run_whose_launcher_runs_is_running(out):
    """Before its ranks take the lock, while they load, and after they have released the lock."""
    os.utime(out / "metrics.jsonl", (1, 1))
    mark = out / "logs" / "launcher.unfinished"
    mark.write_text(Holder.here().to_json())
    assert status.read_status(out).description == "running: starting its processes"
    write_summary(out, status="failed", error="x")
    os.utime(mark, (time.time() - 1000,) * 2)
    report = status.read_status(out)
    assert (report.state, report.description) == ("running", "running: ending its processes")
    mark.write_text(dataclasses.replace(Holder.here(), started="1").to_json())  # killed
    assert status.read_status(out).state == "failed"
    shutil.rmtree(out)
    out.mkdir()
    leave_lock(out)
    report = status.read_status(out)
    assert (report.state, report.steps) == ("running", None)
    assert report.description.endswith("; loading, no step yet")


def test_a_folder_that_cannot_be_read_is_bad_input(out, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(status, "load_summary", refuse)
    with pytest.raises(BadInput, match=r"out: cannot be read \(Permission denied\); check"):
        status.read_status(out)


# Prompts


def test_prompts_in_progress_show_step_and_best_score(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    out = run_folder.write_inputs(tmp_path / "run")
    log = run_folder.MetricsLog(out)
    run_folder.log_steps(log, 0, 60)
    held = run_lock.acquire(out, print)
    try:
        report = status.read_status(out)
        assert report.state == "running"
        assert report.tokens_per_second == pytest.approx(5200, rel=0.1)
        assert [(p.name, p.step, p.steps, p.best_step) for p in report.prompts] == [
            (name, 60, 120, 60) for name in run_folder.PROMPTS
        ]
        table = status_text.as_text(report).split("\n\n")[1].splitlines()
        assert table[0].split() == ["prompt", "task", "step", "train", "loss", "best", "score"]
        assert table[1].startswith("triage      triage   60/120 ")
        assert table[1].endswith("accuracy 85.3% at step 60")
    finally:
        held.release()
        log.close()


def test_a_sweep_of_32_prompts_fits_the_terminal(tmp_path):
    prompts = [
        PromptStatus(
            name=f"a-long-name-of-a-prompt-{i:02d}",
            task="t",
            metric="accuracy",
            num_virtual_tokens=5,
            step=7,
            steps=9,
            train_loss=0.5,
            best={"validation_accuracy": i / 100},
            best_step=5,
        )
        for i in range(32)
    ]
    report = Status(str(tmp_path), "running", "running", prompts=prompts)
    text = status_text.as_text(report, width=60, height=20)
    lines = text.splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= max(60, len(lines[0]))
    assert "-31" in lines[lines.index("") + 2]  # the best one first
    assert lines[-1].startswith("... and ")
    assert len(status_text.as_text(report).splitlines()) > 32


def test_metrics_are_read_incrementally_and_again_after_a_resume(out):
    metrics = run_metrics.RunMetrics(out)
    metrics.update()
    assert metrics.step == 3
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"time": 2000, "step": 4, "prompt": "triage", "metrics": {"train_loss": 9')
        file.flush()
        metrics.update()
        assert metrics.step == 3  # the line is still being written
        file.write("}}\n")
    metrics.update()
    assert (metrics.step, metrics.latest["triage"]["train_loss"]) == (4, (4, 9.0))
    log = run_folder.MetricsLog(out)
    log.rewind(2)
    log.close()
    metrics.update()
    assert metrics.step == 2


def test_quick_reading_finds_the_same_scores(tmp_path):
    out = run_folder.finished_run(tmp_path / "run")
    slow, quick = run_metrics.RunMetrics(out), run_metrics.RunMetrics(out)
    slow.update()
    quick.update(tail_bytes=2000)
    assert (quick.step, quick.written) == (slow.step, slow.written)
    assert quick.validations == slow.validations


# Watch


def test_watch_without_a_terminal_prints_changes_and_ends_with_the_run(out, capsys):
    held = run_lock.acquire(out, print)
    polls = iter(range(100))

    def sleep(_: float) -> None:
        poll = next(polls)
        if poll == 2:
            (out / "checkpoints" / "step-00000003").mkdir()
        if poll == 4:
            (out / "summary.json").write_text('{"status": "failed", "error": "bad luck"}')
            held.release()

    assert status_watch.watch(out, 1.0, sleep=sleep) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("checkpoint ")[2] for line in lines[:2]] == ["step 2", "step 3"]
    assert lines[2].startswith(f"{out}: failed: bad luck")


def test_watch_goes_on_if_a_failed_run_is_started_again(out, capsys):
    (out / "summary.json").write_text('{"status": "failed", "error": "first"}')
    starts = iter([lambda: leave_lock(out), lambda: None])

    def sleep(_: float) -> None:
        act = next(starts, None)
        if act is None:
            (out / "summary.json").write_text('{"status": "finished", "steps": 5}')
            (out / LOCK).unlink(missing_ok=True)
        else:
            act()

    assert status_watch.watch(out, 1.0, sleep=sleep) == 0
    states = [line.partition(": ")[2][:7] for line in capsys.readouterr().out.splitlines() if line]
    assert "failed:" in states[0]


def test_watch_ends_when_the_folder_is_deleted(out, capsys):
    leave_lock(out)
    assert status_watch.watch(out, 1.0, sleep=lambda _: shutil.rmtree(out, True)) == 1
    assert "no such folder" in capsys.readouterr().err


def test_ctrl_c_ends_watch_with_code_0(out):
    leave_lock(out)

    def sleep(_: float) -> None:
        raise KeyboardInterrupt

    assert status_watch.watch(out, 1.0, sleep=sleep) == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--watch"], 75), (["--watch", "0.5"], 75), (["--watch=0"], 2), (["--watch=x"], 2)],
)
def test_watch_takes_seconds_or_none(out, monkeypatch, words, code):
    monkeypatch.setattr(status_watch, "CONFIRM_SECONDS", 0.0)
    done = run_promptshard("status", *words, out)
    assert done.returncode == code, done.stderr


def test_watch_prints_json_lines(out, capsys):
    assert status_watch.watch(out, 1.0, json_lines=True, sleep=lambda _: None) == 75
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["said"].startswith("stopped; ")


# List


def test_list_finds_every_run_once_and_a_damaged_one_hides_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for number, name in enumerate(("old", "deep/er/new", ".hidden/x", "venv/x", "x/broken")):
        out = tmp_path / name
        out.parent.mkdir(parents=True, exist_ok=True)
        run_folder.finished_run(out)
        os.utime(out / "summary.json", (1000 + number,) * 2)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    (tmp_path / "x" / "broken" / "summary.json").unlink()
    (tmp_path / "x" / "broken" / "run.yaml").write_text("[")
    (tmp_path / "run.yaml").touch()  # a run file that a user wrote
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    run_folder.finished_run(tmp_path / "old" / "inside")
    runs = run_list.list_runs(tmp_path)
    names = [str(Path(run.run_dir).relative_to(tmp_path)) for run in runs]
    assert sorted(names) == ["deep/er/new", "old", "x/broken"]
    states = dict(zip(names, (run.state for run in runs), strict=True))
    assert states == {"deep/er/new": "finished", "old": "finished", "x/broken": "unknown"}
    assert names.index("deep/er/new") < names.index("old")
    text = status_text.as_list(runs, width=400)
    assert "accuracy 94.0% at step 120 (triage), 1 more" in text
    (shown,) = [run for run in json.loads(status_text.list_json(runs)) if "new" in run["run_dir"]]
    assert [best["prompt"] for best in shown["best"]] == ["triage", "animals"]
    assert (shown["step"], shown["steps"], len(shown["prompts"])) == (120, 120, 3)


def test_list_of_runs_that_wait_or_have_just_started(tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_list,
        "active_jobs",
        lambda: {"12": slurm_queue.JobState("12", "PENDING", "Priority")},
    )
    submitted = tmp_path / "a" / "logs" / "submitted" / "1"
    submitted.mkdir(parents=True)
    text = yaml.safe_dump(run_folder.run_file(tmp_path / "a"))
    (submitted / "run.yaml").write_text(text)
    (submitted / "job.json").write_text(json.dumps({"job": "12", "tasks": [str(tmp_path / "a")]}))
    (tmp_path / "b" / "logs").mkdir(parents=True)
    write_log(tmp_path / "b", "launcher.log", "x")
    (tmp_path / "b" / "logs" / "launcher.unfinished").touch()
    states = {Path(run.run_dir).name: run.state for run in run_list.list_runs(tmp_path)}
    assert states == {"a": "waiting", "b": "running"}


def test_list_of_a_folder_without_runs_or_of_none(tmp_path):
    done = run_promptshard("list", tmp_path)
    assert done.returncode == 0
    assert "no runs below" in done.stdout
    assert "promptshard train RUN.yaml" in done.stdout
    assert json.loads(run_promptshard("list", tmp_path, "--json").stdout) == []
    (tmp_path / "file").touch()
    for name, problem in (("nowhere", "no such folder"), ("file", "is a file")):
        with pytest.raises(BadInput, match=problem):
            run_list.list_runs(tmp_path / name)
