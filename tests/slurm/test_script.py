"""The sbatch script on a real Slurm, with a fake Python that only logs its call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch.slurm import Job, pattern, render
from tests.slurm.conftest import Desk, nothing_left_of, read, until

#: Notes how it was called. ``code=N`` in its arguments is its exit code in the first session,
#: ``always=N`` in each; ``wait`` lets it stop, as ranks do, when it is signalled.
STAND_IN = """\
#!{python}
import os, signal, sys, time
job, task, restart, node = (
    os.environ.get(name, "0")
    for name in ("SLURM_JOB_NAME", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_NODEID")
)
note = os.path.join(os.environ["NOTES"], f"{{job}}-{{task}}-{{restart}}-{{node}}")
def stop(number, frame):
    for other in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    open(note + ".signals", "a").write(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
with open(note + ".part", "w") as file:
    file.write("\\n".join(sys.argv[1:]))
os.rename(note + ".part", note)
if "wait" in sys.argv:
    time.sleep(60)
for word in sys.argv:
    if word.startswith("always=") or (word.startswith("code=") and restart == "0"):
        sys.exit(int(word.partition("=")[2]))
"""


@pytest.fixture(scope="module")
def notes(desk: Desk) -> Path:
    folder = desk.path / "notes"
    folder.mkdir()
    desk.environment["NOTES"] = str(folder)
    program = desk.path / "python.sh"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    return folder


def job(desk: Desk, name: str, *tasks: tuple[str, ...], **settings: object) -> str:
    log = f"{name}-%A_%a.out" if len(tasks) > 1 else f"{name}-%j.out"
    made = Job(
        name=name,
        nodes=2,
        time="5",
        tasks=tasks,
        code=str(desk.path / "code"),
        python=str(desk.path / "python.sh"),
        chdir=str(desk.path),
        log=pattern(f"{desk.path}/") + log,
        **settings,  # type: ignore[arg-type]
    )
    script = desk.path / f"{name}.sbatch"
    script.write_text(render(made))
    return desk.sbatch(script)


def test_jobs(desk: Desk, notes: Path) -> None:
    """Several jobs at once: most of the time passes until a requeued job may start."""
    words = ("run 'x'.yaml", 'a.b=$HOME `id` "q" \\n', "c=*")
    plain = job(desk, "plain", words, fresh=True)
    bare = job(desk, "bare", ("r",), extra=("--export=NOTES",))
    array = job(desk, "array", ("r0", "code=0"), ("r1", "code=75"), ("r2", "code=3"))
    bounded = job(desk, "bounded", ("r", "always=75"), max_requeues=1)
    refused = job(desk, "notified", ("r", "wait"), max_requeues=0)
    until(lambda: (notes / "notified-0-0-1").exists(), 30, lambda: str(list(notes.iterdir())))
    desk.cluster.run("scancel", "--batch", "--signal=USR1", refused)
    cancelled = job(desk, "cancelled", ("r", "wait"))
    until(lambda: (notes / "cancelled-0-0-1").exists(), 30, lambda: str(list(notes.iterdir())))
    desk.cluster.run("scancel", cancelled)
    until(lambda: not desk.cluster.squeue(), 60, desk.cluster.squeue)

    # quoting, node ranks that differ, and one meeting point with a port of the job's own
    calls = [(notes / f"plain-0-0-{node}").read_text().splitlines() for node in (0, 1)]
    assert [call[0] for call in calls] == [str(desk.path / "code/trainer/runtime/bootstrap.py")] * 2
    port = str(10000 + int(plain))
    for rank, call in enumerate(calls):
        assert call[call.index("--master-addr") + 1] == "127.0.0.1"
        assert call[call.index("--master-port") + 1] == port
        assert call[call.index("--hosts") + 1] == "127.0.0.1,127.0.0.2"
        assert call[-6:] == ["--fresh", *words, "--node-rank", str(rank)]

    # a job without the user's environment
    assert "ended with exit code 0" in read(desk.path / f"bare-{bare}.out")
    assert {path.name for path in notes.glob("bare-*")} == {"bare-0-0-0", "bare-0-0-1"}

    # of the array, the task that stopped and saved was requeued, and no other
    runs = sorted(path.name for path in notes.glob("array-*-0"))
    assert runs == ["array-0-0-0", "array-1-0-0", "array-1-1-0", "array-2-0-0"]
    assert (notes / "array-1-1-0").read_text().splitlines()[-4:-2] == ["r1", "code=75"]
    texts = [read(desk.path / f"array-{array}_{task}.out") for task in (0, 1, 2)]
    assert "ended with exit code 0" in texts[0]
    assert "requeued as restart 1 of at most 20" in texts[1]
    assert "ended with exit code 0" in texts[1]
    assert "ended with exit code 3" in texts[2]

    # restarts are bounded, and come by another port
    assert sorted(p.name for p in notes.glob("bounded-*-0")) == ["bounded-0-0-0", "bounded-0-1-0"]
    assert "requeued 1 times already" in read(desk.path / f"bounded-{bounded}.out")
    again = (notes / "bounded-0-1-0").read_text().splitlines()
    assert again[again.index("--master-port") + 1] == str(10000 + int(bounded) + 1009)

    # a signal to the batch shell reaches the tasks of both nodes
    assert {p.name for p in notes.glob("notified-*.signals")} == {
        "notified-0-0-0.signals",
        "notified-0-0-1.signals",
    }
    assert "the time limit is near" in read(desk.path / f"notified-{refused}.out")
    assert "requeued 0 times already" in read(desk.path / f"notified-{refused}.out")

    # a job that a person cancels is not requeued
    assert "submit it again to resume" in read(desk.path / f"cancelled-{cancelled}.out")
    assert desk.cluster.job(cancelled)["JobState"] == "CANCELLED"
    assert "ended with exit code" not in read(desk.path / f"cancelled-{cancelled}.out")
    assert not list(notes.glob("cancelled-0-1-*"))
    for number in (plain, bare, bounded, refused, cancelled):
        assert nothing_left_of(number)


def test_status_asks_a_real_slurm(desk: Desk, notes: Path) -> None:
    """Read the record that ``submit`` writes, and squeue's state of its job."""
    number = job(desk, "asked", ("r", "wait"))
    until(lambda: (notes / "asked-0-0-0").exists(), 30, desk.cluster.squeue)
    record = desk.path / "out" / "logs" / "submitted" / "now" / "job.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"job": number, "tasks": [str(desk.path / "out")]}))
    report = json.loads(desk.promptshard("status", "out", "--json"))
    assert (report["state"], report["job"]["nodes"]) == ("running", "127.0.0.[1-2]")
    desk.cluster.run("scancel", number)
