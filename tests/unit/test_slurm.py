"""sbatch text and its submission, with stand-ins for Slurm; tests/slurm starts a real one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch import slurm, submit
from launch.run_list import list_runs
from launch.slurm import Job
from launch.status import read_status
from slurm.render import EXAMPLES
from tests.unit.test_launch import promptshard as run_promptshard
from tests.unit.test_launch import run_file  # noqa: F401
from trainer.runtime.errors import BadInput
from trainer.runtime.git_revision import git_revision

ROOT = Path(__file__).resolve().parents[2]

# The text


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_scripts_are_what_is_rendered(name):
    shipped = (ROOT / "slurm" / f"{name}.sbatch").read_text(encoding="utf-8")
    assert shipped == slurm.render(EXAMPLES[name]), "python slurm/render.py writes it anew"
    assert list(slurm.problems(EXAMPLES[name])) == []


def test_no_other_script_is_shipped():
    assert {path.stem for path in (ROOT / "slurm").glob("*.sbatch")} == set(EXAMPLES)


def job(**settings: Any) -> Job:
    return dataclasses.replace(Job(name="a", nodes=2, tasks=(("run.yaml",),)), **settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"nodes": 0}, "--nodes: 0 is too few"),
        ({"gpus_per_node": 0}, "--gpus-per-node: 0 is too few"),
        ({"gpus_per_node": 8, "processes_per_node": 2}, "--processes-per-node: is for nodes"),
        ({"partition": "two words"}, "--partition: 'two words' is not valid; give a name of `sin"),
        ({"partition": "gpu;rm"}, "--partition"),
        ({"account": "a b"}, "--account"),
        ({"qos": "$HOME"}, "--qos"),
        ({"mem": "64GB"}, "--mem: '64GB' is not valid; give megabytes, or as 64G"),
        ({"dependency": "12"}, "--dependency: '12' is not valid; write afterok:JOB_ID"),
        ({"time": "soon"}, "--time: 'soon' is not a valid time; write minutes"),
        ({"time": "1:99"}, "--time: '1:99' is not a valid time"),
        ({"time": "0"}, "--time: '0' is not a valid time"),
        ({"time": "2"}, "--signal-seconds: 120 is not before the time limit"),
        ({"signal_seconds": 0}, "--signal-seconds: 0 is not within 1 to 65535"),
        ({"max_requeues": -1}, "--max-requeues: -1 is too few"),
        ({"modules": ("cuda; ls",)}, "--module: 'cuda; ls' is not valid"),
        ({"extra": ("-C h100",)}, "--sbatch: '-C h100' is not an option; write the whole option"),
        ({"extra": ("--signal=TERM",)}, "--sbatch: --signal is set by the job itself"),
        ({"mounts": ("/a:/b",)}, "--container-mounts: needs --container-image"),
        ({"mounts": ("/a",), "container": "x"}, "--container-mounts: '/a' is not valid"),
        ({"name": "a\n#SBATCH --exclusive"}, "line break"),
        ({"tasks": (("run.yaml", "a=\n"),)}, "line break"),
    ],
)
def test_values_that_slurm_would_misread_are_refused(settings, problem):
    problems = list(slurm.problems(job(**settings)))
    assert any(problem in text for text in problems), problems


@pytest.mark.parametrize("value", ["a\n#SBATCH --wrap=id", "a\rb", "a\x1b[2J", "a\u2028b", "a\tb"])
def test_a_line_of_a_script_takes_no_control_characters(value):
    with pytest.raises(ValueError, match="not a value for a line of a script"):
        slurm.directive(value)
    for settings in ({"name": value}, {"log": value}, {"chdir": value}, {"code": value}):
        assert any("line break" in text for text in slurm.problems(job(**settings))), settings


def test_an_output_folder_adds_no_line_to_a_script(run_file):  # noqa: F811
    """It becomes the job's name and the path of its log, after the options have been checked."""
    bad = json.dumps(f"{run_file.parent}/x\n#SBATCH --comment=ran\nid")
    text = run_file.read_text().replace(f"output_dir: {run_file.parent}/out", f"output_dir: {bad}")
    run_file.write_text(text)
    done = run_promptshard("submit", run_file, "--nodes", "1", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "run.yaml:1: output_dir: " in done.stderr
    assert "holds '\\n', which no path may" in done.stderr


def test_a_printed_script_shows_no_password(run_file):  # noqa: F811
    override = "tracking.uri=http://me:hunter22@host"
    done = run_promptshard("submit", run_file, override, "--nodes", "1", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "tracking.uri=http://***@host': the script would show the password" in done.stderr
    assert "hunter22" not in done.stderr


def test_notes_about_rows_are_printed_once_for_an_array(run_file):  # noqa: F811
    row = (run_file.parent / "train.jsonl").read_text().splitlines()[0]
    (run_file.parent / "validation.jsonl").write_text(f"{row}\n")
    words = [
        "tasks[0].validation_share=null",
        f"tasks[0].validation={run_file.parent}/validation.jsonl",
    ]
    words += ["--nodes", "1", "--dry-run", "--array", "training.seed=[0, 1, 2]"]
    done = run_promptshard("submit", run_file, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("also in train") == 1


def test_all_problems_at_once():
    assert len(list(slurm.problems(job(nodes=0, time="x", partition="a b")))) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"dependency": "afterok:12:13_4,afternotok:7"},
        {"dependency": "singleton"},
        {"partition": "gpu,long-2"},
        {"mem": "0"},
        {"time": "1-0", "extra": ("--constraint=a&b", "--exclusive")},
    ],
)
def test_good_settings(settings):
    assert list(slurm.problems(job(**settings))) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("01:00:00", 3600),
        ("2-3", 183600),
        ("1-0:5", 86700),
        ("1-00:00:01", 86401),
        ("1:2:3:4", None),
        ("-5", None),
        ("", None),
    ],
)
def test_times_as_sbatch_reads_them(text, seconds):
    assert slurm.time_seconds(text) == seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain-1.out", "plain-1.out"),
        ("two words", '"two words"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("#x", '"#x"'),
        ("", '""'),
    ],
)
def test_values_of_directives(value, text):
    assert slurm.directive(value) == text


def test_containers_and_modules():
    text = slurm.render(
        job(
            container="nvcr.io#nvidia/pytorch:25.01 py3",
            mounts=("/data:/data:ro",),
            modules=("cuda/12.4",),
            chdir="/proj/me",
            code="/out/code",
            gpus_per_node=4,
            cpus_per_task=32,
        )
    )
    assert "module load cuda/12.4 || exit 1\n" in text
    assert "'--container-image=nvcr.io#nvidia/pytorch:25.01 py3'" in text
    assert "--container-mounts=/data:/data:ro,/proj/me:/proj/me,/out/code:/out/code" in text
    assert "--container-workdir=/proj/me" in text
    # since 22.05 srun does not inherit it
    assert text.count("--cpus-per-task=32") == 2
    # otherwise it would inherit --export=NONE from sbatch
    assert "--export=ALL" in text
    assert "--need-gpus" in text


# The script as bash runs it, with stand-ins for scontrol and srun

SRUN = """\
#!{python}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    del command[0]
signal.signal(signal.SIGUSR1, lambda *_: [node.send_signal(signal.SIGUSR1) for node in nodes])
nodes = [subprocess.Popen(command, env=dict(os.environ, SLURM_NODEID=str(n))) for n in (0, 1)]
sys.exit(max(node.wait() for node in nodes))
"""
NODE = """\
#!{python}
import os, signal, sys, time
def stop(*_):
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
with open(f"{{os.environ['FOLDER']}}/node-{{os.environ['SLURM_NODEID']}}", "w") as file:
    file.write("\\n".join(sys.argv[1:]))
if os.environ["CODE"] == "wait":
    time.sleep(30)
sys.exit(int(os.environ["CODE"]))
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> "$FOLDER/requeued"; else printf 'n7\\nn9\\n'; fi
"""


class Batch:
    """A folder whose job can be run by bash."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", NODE)):
            path = folder / name
            path.write_text(text if name == "scontrol" else text.format(python=sys.executable))
            path.chmod(0o755)
        (folder / "job").write_text(slurm.render(job(python=str(folder / "python"), **settings)))

    def start(self, code: str, **environ: str) -> subprocess.Popen[str]:
        given = {
            "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
            "FOLDER": str(self.folder),
            "CODE": code,
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "n[7,9]",
            "SLURM_JOB_NUM_NODES": "2",
            # the batch shell's own, and the address that some take for the first node's
            "SLURM_NODEID": "0",
            "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
        }
        return subprocess.Popen(
            ["bash", str(self.folder / "job")],
            env=given | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, code: str, **environ: str) -> tuple[int, str]:
        process = self.start(code, **environ)
        text, _ = process.communicate(timeout=30)
        return process.returncode, text

    def processes(self) -> list[str]:
        """Processes of the job, by their environment."""
        own = f"FOLDER={self.folder}".encode()
        alive = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if own in environ.read_bytes().split(b"\0"):
                    alive.append(environ.parent.name)
        return alive

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


def test_each_node_gets_its_own_rank_and_all_the_same_meeting_point(tmp_path):
    batch = Batch(tmp_path, processes_per_node=3)
    code, text = batch.run("0")
    assert code == 0, text
    for rank in (0, 1):
        words = (tmp_path / f"node-{rank}").read_text().splitlines()
        assert words[words.index("--node-rank") + 1] == str(rank)
        assert words[words.index("--master-addr") + 1] == "n7"
        assert words[words.index("--master-port") + 1] == "10007"
        assert words[words.index("--hosts") + 1] == "n7,n9"
        assert words[words.index("--slots") + 1] == "3"
        assert "10.0.0.99" not in words
    assert batch.requeued == []


def test_modules_may_read_unset_variables(tmp_path):
    batch = Batch(tmp_path, modules=("conda/24",))
    code, text = batch.run("0", **{"BASH_FUNC_module%%": '() { echo "${1}ed $2 $NOT_SET"; }'})
    assert "loaded conda/24" in text
    assert code == 0, text


def test_a_host_that_scontrol_does_not_name_is_no_reason_for_localhost(tmp_path):
    code, text = Batch(tmp_path).run("0", SLURM_JOB_NUM_NODES="3")
    assert code == 2
    assert "scontrol names 2 hosts, but the job has 3 nodes" in text
    assert not (tmp_path / "node-0").exists()


@pytest.mark.parametrize(
    ("code", "environ", "requeued"),
    [
        ("75", {}, ["20007"]),
        ("75", {"SLURM_RESTART_COUNT": "1"}, ["20007"]),
        ("75", {"SLURM_RESTART_COUNT": "2"}, []),
        # the id of an array's last task is that of the whole array
        ("75", {"SLURM_ARRAY_JOB_ID": "20007", "SLURM_ARRAY_TASK_ID": "1"}, ["20007_1"]),
        ("1", {}, []),
        ("2", {}, []),
        ("0", {}, []),
    ],
)
def test_it_requeues_itself_when_the_ranks_have_saved(tmp_path, code, environ, requeued):
    batch = Batch(tmp_path, max_requeues=2)
    ended, text = batch.run(code, **environ)
    assert (ended, batch.requeued) == (int(code), requeued), text


@pytest.mark.parametrize(
    ("number", "requeued", "ending"),
    [
        (signal.SIGUSR1, ["20007"], "requeued as restart 1 of at most 20"),
        (signal.SIGTERM, [], "submit it again to resume, unless Slurm requeues it"),
    ],
)
def test_signals_to_the_batch_shell_reach_the_nodes(tmp_path, number, requeued, ending):
    batch = Batch(tmp_path)
    process = batch.start("wait")
    deadline = time.monotonic() + 20
    while not (tmp_path / "node-1").exists() or not (tmp_path / "node-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=30)
    assert not batch.processes(), "Slurm would kill what is left of a job"
    text, _ = process.communicate(timeout=30)
    assert (process.returncode, batch.requeued) == (75, requeued), text
    assert text.count("signalling the ranks to save and stop") == 1
    assert ending in text


def test_a_job_that_started_over_is_submitted_again_without_the_option(tmp_path):
    ended, text = Batch(tmp_path, fresh=True, max_requeues=0).run("75")
    assert ended == 75
    assert "submit it again without --fresh to resume" in text


def test_every_session_of_a_job_receives_the_flags_fresh_and_verbose(tmp_path):
    """It may be requeued before it has put the earlier run aside; it knows whether it has."""
    batch = Batch(tmp_path, fresh=True, verbose=True)
    for restart in "01":
        batch.run("0", SLURM_RESTART_COUNT=restart)
        assert {"--fresh", "--verbose"} <= set((tmp_path / "node-0").read_text().splitlines())


def test_the_command_is_a_comment_of_one_line():
    script = slurm.render(job(command="promptshard submit --array 'training.seed=[0,\n 1]'"))
    assert script.splitlines()[1] == "# promptshard submit --array 'training.seed=[0, 1]'"
    assert script.splitlines()[2].startswith("#SBATCH")


# Submission

SBATCH = """\
#!/bin/bash
if [ "$1" = --version ]; then echo "slurm-wlm ${VERSION:-22.05.8}"; exit; fi
env > "$FOLDER/environment"
cp "${@: -1}" "$FOLDER/submitted.sbatch"
if [ -n "${REFUSES:-}" ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
echo "4711;cluster"
"""


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("FOLDER", str(folder))
    return folder


def test_submit_freezes_what_it_submits(run_file, fake_slurm, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # called from within another job
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CONF_SERVER": "host"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    done = run_promptshard(
        "submit", run_file, "training.steps=9", "--nodes", "2", "--partition", "gpu"
    )
    assert done.returncode == 0, done.stderr
    assert "submitted job 4711" in done.stdout
    assert f"promptshard status {run_file.parent}/out" in done.stdout
    (folder,) = (run_file.parent / "out" / "logs" / "submitted").iterdir()
    script = (fake_slurm / "submitted.sbatch").read_text()
    assert script == (folder / "job.sbatch").read_text()
    assert f"set -- {folder}/run.yaml\n" in script
    assert f" {folder}/code/trainer/runtime/bootstrap.py launch.node " in script
    assert "steps: 9" in (folder / "run.yaml").read_text()
    assert (folder / "run.yaml").stat().st_mode & 0o077 == 0
    assert f"deepspeed: {folder}/policy.json" in (folder / "run.yaml").read_text()
    for name in ("trainer/__main__.py", "launch/node.py", "ds_configs/zero3.json"):
        assert (folder / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    assert git_revision(folder / "code") == git_revision(ROOT)
    given = dict(line.split("=", 1) for line in environment_lines(fake_slurm))
    assert kept.items() <= given.items()
    assert not {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"} & set(given)


def test_variables_of_sbatch_do_not_override_options(run_file, fake_slurm, monkeypatch):  # noqa: F811
    """sbatch prefers them to the script, but its own options to them."""
    for name in ("PARTITION", "TIMELIMIT", "MEM_PER_NODE", "JOB_NAME", "NO_REQUEUE", "CONSTRAINT"):
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    done = run_promptshard(
        *("submit", run_file, "--nodes", "1", "--partition", "gpu", "--time", "60", "--mem", "0"),
        "--sbatch=--constraint=h100",
    )
    assert done.returncode == 0, done.stderr
    environment = (fake_slurm / "environment").read_text().splitlines()
    assert [line for line in environment if line.startswith("SBATCH_")] == ["SBATCH_ACCOUNT=mine"]


def test_scripts_contain_no_password(run_file, fake_slurm):  # noqa: F811
    """Slurm keeps a copy that others may read; the run file is for its owner's eyes."""
    address = "tracking.uri=http://me:hunter2-secret@localhost:5000"
    done = run_promptshard("submit", run_file, address, "--nodes", "1")
    assert done.returncode == 0, done.stderr
    (folder,) = (run_file.parent / "out" / "logs" / "submitted").iterdir()
    places = [
        fake_slurm / "submitted.sbatch",
        *(folder / name for name in ("job.sbatch", submit.RECORD)),
    ]
    for place in places:
        assert "hunter2" not in place.read_text(), place
        assert "tracking.uri" in place.read_text(), "the command is recorded"
    assert "hunter2" not in done.stdout + done.stderr


def environment_lines(folder: Path) -> list[str]:
    return [x for x in (folder / "environment").read_text().splitlines() if x.startswith("SLURM")]


def test_a_sweep_is_an_array_of_run_files(run_file, fake_slurm):  # noqa: F811
    done = run_promptshard(
        *("submit", run_file, "--nodes", "1", "--array", "training.seed=[0, 1]"),
        *("--array", "training.steps=[5, 7]", "--at-once", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert "job array 4711 of 4 tasks" in done.stdout
    script = (fake_slurm / "submitted.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in script
    (folder,) = (run_file.parent / "out" / "logs" / "submitted").iterdir()
    last = (folder / "run-3.yaml").read_text()
    assert f"output_dir: {run_file.parent}/out/seed-1-steps-7\n" in last
    assert "steps: 7" in last
    report = read_status(run_file.parent / "out")
    assert [Path(task.run_dir).name for task in report.tasks] == [
        *("seed-0-steps-5", "seed-0-steps-7", "seed-1-steps-5", "seed-1-steps-7")
    ]


def test_jobs_of_other_clusters_are_looked_up_there(run_file, fake_slurm):  # noqa: F811
    """Another job may have the same number on the default cluster."""
    answers = "case $* in *--clusters=cluster*) echo '4711|PENDING|Priority||1';; esac"
    (fake_slurm / "squeue").write_text(f"#!/bin/sh\n{answers}\n")
    (fake_slurm / "squeue").chmod(0o755)
    done = run_promptshard("submit", run_file, "--nodes", "1", "--sbatch=--clusters=cluster")
    assert done.returncode == 0, done.stderr
    assert "scancel --clusters=cluster 4711 " in done.stdout
    assert read_status(run_file.parent / "out").state == "waiting"
    states = [run.state for run in list_runs(run_file.parent)]
    assert states == ["waiting"]
    done = run_promptshard("submit", run_file, "--nodes", "1")
    assert "job 4711 for" in done.stderr


def test_an_array_of_one_task_is_a_job(run_file, fake_slurm):  # noqa: F811
    (fake_slurm / "squeue").write_text("#!/bin/sh\necho '4711|PENDING|Priority||1:00'\n")
    (fake_slurm / "squeue").chmod(0o755)
    done = run_promptshard("submit", run_file, "--nodes", "1", "--array", "training.seed=[3]")
    assert done.returncode == 0, done.stderr
    out = run_file.parent / "out" / "seed-3"
    assert f"promptshard status {out}\n" in done.stdout
    assert "#SBATCH --array" not in (fake_slurm / "submitted.sbatch").read_text()
    assert read_status(out).state == "waiting"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--nodes", "0"], "--nodes: 0 is too few"),
        (["--nodes", "1", "--time", "1 hour"], "--time: '1 hour' is not a valid time"),
        (["--nodes", "1", "--partition", "a b"], "--partition: 'a b'"),
        (["--nodes", "1", "training.stepz=1"], "training.stepz: unknown setting"),
        (["--nodes", "1", "--array", "training.seed=3"], "write KEY=[VALUE, VALUE]"),
        (["--nodes", "1", "--array", "training.seed=[x]"], "training.seed"),
        (["--nodes", "1", "--array", "training.seed=[1, 1.0]"], "has 1.0 more than once"),
        (["--nodes", "1", "--array", "training.seed=[01]"], "write 1 or, for text"),
        ([], "--nodes"),
    ],
)
def test_bad_input_is_refused_before_sbatch(run_file, fake_slurm, words, problem):  # noqa: F811
    done = run_promptshard("submit", run_file, *words)
    assert done.returncode == 2
    assert problem in done.stderr
    assert not (fake_slurm / "submitted.sbatch").exists()
    assert not (run_file.parent / "out").exists()


def test_a_refused_submission_leaves_no_files(run_file, fake_slurm, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REFUSES", "yes")
    done = run_promptshard("submit", run_file, "--nodes", "1")
    assert done.returncode == 2
    assert "sbatch refused the job: sbatch: error: invalid partition" in done.stderr
    assert list((run_file.parent / "out" / "logs" / "submitted").iterdir()) == []


def test_a_second_job_for_the_same_folder_has_to_wait(run_file, fake_slurm):  # noqa: F811
    assert run_promptshard("submit", run_file, "--nodes", "1").returncode == 0
    (fake_slurm / "squeue").write_text("#!/bin/sh\necho '4711|RUNNING|None|n1|1:00'\n")
    (fake_slurm / "squeue").chmod(0o755)
    done = run_promptshard("submit", run_file, "--nodes", "1")
    assert done.returncode == 2
    assert "is running; scancel it" in done.stderr
    words = ["submit", run_file, "--nodes", "1", "--dependency", "afterany:4711"]
    assert run_promptshard(*words).returncode == 0


def test_an_old_slurm_or_none(run_file, fake_slurm, monkeypatch):  # noqa: F811
    monkeypatch.setenv("VERSION", "20.11.9")
    done = run_promptshard("submit", run_file, "--nodes", "1")
    assert done.returncode == 2
    assert "20.11.9 is too old; Slurm 22.05 or newer is needed" in done.stderr
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="sbatch is not on PATH"):
        submit.check_slurm()


def test_a_dry_run_prints_the_script_alone(run_file, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if not Path("/usr/bin/sbatch").exists() else "/bin")
    done = run_promptshard("submit", run_file, "a.b", "--nodes", "1", "--dry-run")
    assert done.returncode == 2  # checked like any other
    done = run_promptshard("submit", run_file, "training.seed=3", "--nodes", "1", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n# promptshard submit ")
    assert f"set -- {run_file} training.seed=3\n" in done.stdout
    assert "not submitted (--dry-run)" in done.stderr
    assert not (run_file.parent / "out").exists()
