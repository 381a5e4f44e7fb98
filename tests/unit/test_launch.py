"""The command line: what it starts, for whom, and how it answers bad input."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from launch import arguments, exit_report, launcher_command, launcher_process, node, preflight, ssh
from launch.__main__ import has_other_result
from launch.launcher_command import Devices, Host, Place
from tests.command_line import promptshard
from trainer.checkpointing.run_lock import Holder
from trainer.runtime import bootstrap
from trainer.runtime.errors import BadInput
from trainer.runtime.process import ROWS_CHECKED, START_OPTIONS, STARTED

ROOT = Path(__file__).resolve().parents[2]
#: Environment variables that ``train`` sets.
START_VARIABLES = (ROWS_CHECKED, START_OPTIONS, STARTED)
GPUS = ["GPU-aa11", "GPU-ab22", "GPU-cc33"]

RUN = """\
output_dir: {folder}/out
base:
  model: {folder}/base
tasks:
  - name: triage
    train: {folder}/train.jsonl
    input: "{{text}}\\nTopic:"
    target: " {{label}}"
    choices: [heart, other]
    validation_share: 0
prompts:
  - name: triage
    task: triage
    learning_rate: 0.01
training:
  steps: 5
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    rows = [{"text": "chest pain", "label": "heart"}, {"text": "a cold", "label": "other"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


#: The base of the run file has no tokenizer, which ``validate`` reads.
TINY_BASE = f"base.model={ROOT / 'examples' / 'tiny_base'}"


def promptshard_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["validate", "--help"], 0),
        (["settings", "training.steps"], 0),
        (["train", "RUN", "training.step=5"], 2),
        (["no-such-command"], 2),
    ],
)
def test_a_process_ends_as_its_command_does(run_file, words, code):
    """The same code and output as in the process of the tests."""
    words = [str(run_file) if word == "RUN" else word for word in words]
    process, here = promptshard_process(*words), promptshard(*words)
    assert (process.returncode, here.returncode) == (code, code), process.stderr
    assert (process.stdout, process.stderr) == (here.stdout, here.stderr)


# What is started


def parsed(command: list[str]) -> Any:
    """What the per-node part of DeepSpeed's launcher reads in a command of ours."""
    from deepspeed.launcher.launch import parse_args

    launcher = [bootstrap.FILE, "--parent-death=SIGKILL", "launch.local_launcher"]
    assert command[:4] == [sys.executable, *launcher]
    with patch.object(sys, "argv", command[3:]):
        namespace = parse_args()
    namespace.world = json.loads(base64.urlsafe_b64decode(namespace.world_info))
    assert not namespace.module
    assert namespace.no_local_rank
    # by the path of a file: a rank started with -m would import from the working directory
    rank = [bootstrap.FILE, "--parent-death=SIGTERM", "--arguments-in-environment", "trainer"]
    assert [namespace.training_script, *namespace.training_script_args] == rank
    return namespace


def test_ranks_get_the_environment_of_the_deepspeed_launcher(tmp_path):
    """Both programs start the second host's ranks with the same arguments."""
    world = {"n1": [0], "n2": [2, 3]}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps([dict(os.environ), "
        "sys.argv]))\n"
    )
    given = {}
    for module in ("deepspeed.launcher.launch", "launch.local_launcher"):
        out = tmp_path / module
        out.mkdir()
        words = [f"--world_info={encoded}", "--node_rank=1", "--master_addr=n1"]
        words += ["--master_port=4711", "--no_local_rank", str(rank), str(out), "--a", "b c"]
        done = subprocess.run(
            [*bootstrap.command(module), *words],
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        spawned = launcher_process.SPAWNED.findall(done.stdout + done.stderr)
        assert len(spawned) == 2
        ranks = {path.name: json.loads(path.read_text()) for path in sorted(out.iterdir())}
        for environment, words in ranks.values():
            environment.pop(bootstrap.PARENT)
            # of the import of DeepSpeed, also in each rank
            environment.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
            words[1] = "OUT"
        given[module] = ranks
    first, second = given.values()
    assert list(second) == ["1", "2"]
    assert first == second


@pytest.mark.parametrize(
    ("devices", "shown"),
    [
        (Devices("cpu", (0, 1)), "deepspeed --num_gpus 2 --module trainer r.yaml 'a.b=[1, 2]'"),
        (
            Devices("cuda", (2, 3)),
            "deepspeed --include localhost:2,3 --module trainer r.yaml 'a.b=[1, 2]'",
        ),
    ],
)
def test_the_launcher_of_one_machine_gets_its_devices(devices, shown):
    namespace = parsed(launcher_command.local_command("trainer", devices, 4711))
    assert namespace.world == {"localhost": list(devices.ids)}
    assert (namespace.node_rank, namespace.master_addr, namespace.master_port) == (
        0,
        "127.0.0.1",
        4711,
    )
    assert launcher_command.by_hand("trainer", ["r.yaml", "a.b=[1, 2]"], devices, None) == shown


def test_arguments_for_several_hosts(tmp_path, monkeypatch):
    from deepspeed.launcher.runner import parse_args

    monkeypatch.chdir(tmp_path)
    command = launcher_command.hostfile_command("trainer", ["r.yaml", "--fresh"], "hosts", 4, 4711)
    assert command[:3] == [sys.executable, bootstrap.FILE, "deepspeed.launcher.runner"]
    arguments = parse_args(command[3:])
    assert (arguments.hostfile, arguments.num_gpus) == (str(tmp_path / "hosts"), 4)
    assert (arguments.force_multi, arguments.no_local_rank, arguments.master_port) == (
        True,
        True,
        4711,
    )
    assert not arguments.module
    assert arguments.user_script == bootstrap.FILE
    assert arguments.user_args == [f"--chdir={tmp_path}", "trainer", "r.yaml", "--fresh"]
    shown = launcher_command.by_hand(
        "trainer", ["r.yaml", "uri=http://me:secret@host"], None, "hosts"
    )
    assert shown == "deepspeed --hostfile hosts --module trainer r.yaml uri=http://***@host"


TWO_HOSTS = (Host("n1", 2), Host("n2", 2))


def test_arguments_for_one_host_of_several():
    """Slurm may give us GPUs 4 and 6 of a host."""
    for ids in ((0, 1), (4, 6)):
        place = Place(TWO_HOSTS, 1, "n1", 4711)
        namespace = parsed(launcher_command.place_command("trainer", place, Devices("cuda", ids)))
        assert namespace.world == {"n1": [0, 1], "n2": list(ids)}
        assert list(namespace.world)[namespace.node_rank] == "n2"
        assert (namespace.master_addr, namespace.master_port) == ("n1", 4711)


def test_a_host_without_the_gpus_that_it_should_have(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher_command, "list_gpus", lambda: GPUS[:1])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    place = Place(TWO_HOSTS, 0, "127.0.0.1", 4711)
    with pytest.raises(BadInput, match="n1: 1 GPU visible, but 2 processes requested"):
        node.run("trainer", ["r.yaml"], str(tmp_path), place)
    monkeypatch.setattr(launcher_command, "list_gpus", list)
    with pytest.raises(BadInput, match="n1: 0 GPUs visible, but 2"):
        node.run("trainer", ["r.yaml"], str(tmp_path), place, need_gpus=True)


def test_a_first_host_that_is_not_known_here(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher_command, "list_gpus", list)
    place = Place(TWO_HOSTS, 0, "no-such-host.invalid", 4711)
    with pytest.raises(BadInput, match="--master-addr: 'no-such-host"):
        node.run("trainer", ["r.yaml"], str(tmp_path), place)


def test_environment_shares_the_cores_and_hides_nothing_else():
    own = {bootstrap.PARENT: str(os.getpid())}

    def environment(given, devices, cores, *arguments):
        variables = launcher_command.environment(given, devices, cores, arguments)
        assert json.loads(variables.pop(bootstrap.ARGUMENTS)) == list(arguments)
        assert own.items() <= variables.items()
        return {name: value for name, value in variables.items() if name not in own}

    two = Devices("cpu", (0, 1))
    cpu = environment({"A": "1", "CUDA_VISIBLE_DEVICES": ""}, two, 8, "r.yaml", "a=\u00fc")
    added = {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
    assert cpu == {"A": "1", **added}
    active = environment({"OMP_WAIT_POLICY": "ACTIVE"}, two, 8)
    assert active["OMP_WAIT_POLICY"] == "ACTIVE", "that of the user"
    in_mpi = {"CUDA_VISIBLE_DEVICES": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    gpu = environment(in_mpi, Devices("cuda", (1,)), 8)
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert gpu == {"OMP_NUM_THREADS": "8", "DS_ACCELERATOR": "cuda", **order}
    assert environment({"OMP_NUM_THREADS": "3"}, two, 1)["OMP_NUM_THREADS"] == "3"
    assert environment({}, two, 1)["OMP_NUM_THREADS"] == "1"


def test_free_port_can_be_bound():
    assert 1024 <= launcher_command.free_port() < 65536


# On which devices


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("1,-1,2", [1]),
        ("NoDevFiles", []),
        ("none", []),
        (" ", []),
        ("2,NoDevFiles,0", [2]),
        ("GPU-cc", [2]),
        ("GPU-cc33, 0", [2, 0]),
    ],
)
def test_visible_gpus(visible, expected):
    assert launcher_command.visible_gpus(GPUS, visible) == expected


@pytest.mark.parametrize("visible", ["7", "GPU-zz", "GPU-a", "MIG-1"])
def test_visible_gpus_that_are_not_there(visible):
    with pytest.raises(BadInput, match=f"CUDA_VISIBLE_DEVICES={visible}"):
        launcher_command.visible_gpus(GPUS, visible)


def test_devices_are_all_gpus_or_two_cpu_processes():
    assert launcher_command.choose_devices(None, [2, 3]) == Devices("cuda", (2, 3))
    assert launcher_command.choose_devices(1, [2, 3]) == Devices("cuda", (2,))
    assert launcher_command.choose_devices(None, []) == Devices("cpu", (0, 1))
    assert launcher_command.choose_devices(3, []) == Devices("cpu", (0, 1, 2))
    with pytest.raises(BadInput, match="--processes: 99999999999 is more than 1024; give fewer"):
        launcher_command.choose_devices(99999999999, [])


@pytest.mark.parametrize("count", [0, -1, 3])
def test_impossible_process_counts_are_refused(count):
    with pytest.raises(BadInput, match=f"--processes: {count} "):
        launcher_command.choose_devices(count, [0, 1])


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa11)'\n"
        "echo '  MIG 1g.10gb     Device  0: (UUID: MIG-xx)'\n"
        "echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-ab22)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0")
    assert launcher_command.list_gpus() == ["GPU-aa11", "GPU-ab22"]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert launcher_command.list_gpus() == []


def test_hostfiles(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# mine\nn1 slots=8\n\nn2   slots=4\n")
    assert launcher_command.read_hostfile(str(path)) == [Host("n1", 8), Host("n2", 4)]
    path.write_text("n1\nn2 slots=x\nn3 slots=1\nn3 slots=1\n")
    with pytest.raises(BadInput) as caught:
        launcher_command.read_hostfile(str(path))
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["1", "2", "4"]
    for name in ("-oProxyCommand=touch", "n1;id", "$(id)", "a@-x", "n1,n2"):
        path.write_text(f"{name} slots=1\n")
        with pytest.raises(BadInput, match="is not a host name or address"):
            launcher_command.read_hostfile(str(path))
    for name in ("me@n1.example.org", "10.0.0.1", "fe80::1%eth0", "a_b-c"):
        path.write_text(f"{name} slots=1\n")
        assert launcher_command.read_hostfile(str(path)) == [Host(name, 1)]
    path.write_text("#" * (launcher_command.MAX_HOSTFILE + 1))
    with pytest.raises(BadInput, match="has more than"):
        launcher_command.read_hostfile(str(path))
    path.write_text("")
    with pytest.raises(BadInput, match="has no hosts"):
        launcher_command.read_hostfile(str(path))
    with pytest.raises(BadInput, match="cannot read"):
        launcher_command.read_hostfile(str(tmp_path / "none"))


def test_a_hostfile_that_means_this_machine_needs_no_ssh():
    assert launcher_command.is_local([Host("localhost", 2)])
    assert not launcher_command.is_local([Host("elsewhere", 2)])
    assert not launcher_command.is_local([Host("localhost", 2), Host("elsewhere", 2)])


def test_what_remote_shells_would_change_is_refused(tmp_path, monkeypatch):
    for tool in ("pdsh", "ssh"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher_command.check_remote(["run.yaml", "prompts[0].seed=1", "training.steps=5", "--fresh"])
    for text in ("a=$HOME", "a=`x`", "a=(b)", "a=b;c", "a='x'", "a=\nb", "a={x}"):
        with pytest.raises(BadInput, match="write it into the run file"):
            launcher_command.check_remote([text])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="pdsh is not installed"):
        launcher_command.check_remote([])


# How it ended


@pytest.mark.parametrize(
    ("returncode", "stopped", "lost", "resumable", "code", "message"),
    [
        (0, [], False, True, 0, ""),
        (0, [signal.SIGINT], False, True, 0, ""),
        (2, [], True, True, 2, ""),
        (75, [signal.SIGTERM], True, True, 75, ""),
        (1, [], True, True, 1, "a process ended with exit code 1; see the logs in logs"),
        (3, [], True, True, 1, "a process ended with exit code 3; see the logs in logs"),
        (247, [], True, True, 1, "a process was killed by SIGKILL (out of memory?); see the logs"),
        (245, [], True, True, 1, "a process was killed by SIGSEGV; see the logs"),
        (-15, [], True, True, 1, "the launcher was killed by SIGTERM; see the logs"),
        (0, [], True, True, 1, "the processes ended with exit code 0, but rank 0 did not finish"),
        (254, [signal.SIGINT], True, False, 1, "Stopped by SIGINT; all processes have ended."),
        (
            -9,
            [signal.SIGUSR1],
            True,
            True,
            75,
            "Stopped by SIGUSR1; all processes have ended. Re",
        ),
    ],
)
def test_exit_codes(returncode, stopped, lost, resumable, code, message):
    log = Path("logs/launcher.log")
    ending = exit_report.describe(returncode, stopped, log, lost=lost, resumable=resumable)
    assert ending.code == code
    assert ending.message.startswith(message)
    assert bool(ending.message) == bool(message)


def test_a_rank_ended_by_the_watchdog_is_the_reported_cause():
    """Not the one that noticed it, which ended first."""
    ending = exit_report.describe(
        1,
        [],
        Path("logs/launcher.log"),
        lost=True,
        resumable=True,
        first=("rank 0", 9),
        hung="rank 1 on n1 hangs",
    )
    assert ending == exit_report.ExitReport(1, "rank 1 on n1 hangs; see the logs in logs")


#: A launcher that loses its first rank, asks the second to end and waits for it; that one is deaf.
FAILING = """
import signal, subprocess, sys, time
from trainer.runtime.bootstrap import FILE
lost = subprocess.Popen([sys.executable, "-u", FILE, "timeit", "-n1", "-r1", "pass"])
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
left = subprocess.Popen([sys.executable, "-u", FILE, "timeit", "-n1", "-r1", deaf])
for rank in (lost, left):
    print(f"[launch] process {rank.pid} spawned with command: ...", flush=True)
lost.wait()
print("Killing subprocess", flush=True)
left.terminate()
left.wait()
sys.exit(256 - 9)
"""


def test_the_killed_rank_is_named_among_ended_ranks(tmp_path):
    """One that is done is no loss; peers of a killed one fail at the same moment."""
    log = tmp_path / "launcher.log"
    ends = ("pass", "raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)")
    ranks = [subprocess.Popen([sys.executable, "-c", end]) for end in ends]
    for rank in ranks:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
    started = "".join(f"process {rank.pid} spawned with command: x\n" for rank in ranks)
    log.write_text(started + f"Process {ranks[0].pid} exits successfully.\n")
    losses = launcher_process._FailureWatch(log, 3, 4, lambda: None)
    losses.poll()
    losses.poll()
    who, number = losses.first
    assert (who, number) == (f"rank 6 (process {ranks[2].pid} on {platform.node()})", 9)
    assert [rank.wait() for rank in ranks] == [0, 1, -9]
    ending = exit_report.describe(1, [], log, lost=True, resumable=True, first=losses.first)
    assert ending.message.startswith(f"{who} was killed by SIGKILL")


def test_ranks_that_wait_for_a_lost_one_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher_process, "LOSS_SECONDS", 0.5)
    (tmp_path / "lost.txt").write_text("of an earlier run")
    started = time.monotonic()
    ending = launcher_process.run_local(
        [sys.executable, "-c", FAILING], os.environ, tmp_path / "launcher.log", "timeit", 2, 5.0, 6
    )
    assert time.monotonic() - started < 25
    assert ending.code == 1
    assert re.match(r"rank 6 \(process \d+ on \S+\) was killed by SIGKILL", ending.message)


#: A launcher whose second rank fails.
FAILED = """
import os, subprocess, sys, time
ends = ("pass", sys.argv[2])
with open(sys.argv[1], "a") as log:
    ranks = [subprocess.Popen([sys.executable, "-c", end], stderr=log) for end in ends]
for rank in ranks:
    print(f"[launch] process {rank.pid} spawned with command: ...", flush=True)
print(f"Process {ranks[0].pid} exits successfully.", flush=True)
os.waitid(os.P_PID, ranks[1].pid, os.WEXITED | os.WNOWAIT)
time.sleep(1)  # the launcher keeps failed ranks as zombies, too
sys.exit(1)
"""


@pytest.mark.parametrize("first_rank", [0, 3])
def test_the_error_of_a_rank_other_than_0_is_shown(tmp_path, first_rank):
    """Only rank 0 prints; the error of an earlier start stays in the log."""
    log = tmp_path / f"rank-{first_rank + 1}.log"
    log.write_text("Traceback (most recent call last)\nKeyError: 'earlier'\n")

    def message(end: str) -> str:
        command = [sys.executable, "-c", FAILED, str(log), end]
        chatter = tmp_path / "launcher.log"
        return launcher_process.run_local(
            command, os.environ, chatter, "trainer", 2, first_rank=first_rank
        ).message

    ended = rf"rank {first_rank + 1} \(process \d+ on \S+\) ended with exit code 1"
    assert re.match(f"{ended}: ValueError: 7; see the logs", message("raise ValueError(7)"))
    assert re.match(f"{ended}; see the logs", message("raise SystemExit(1)"))
    lost = "raise RuntimeError('Connection closed by peer')"  # another rank has the reason
    assert re.match(f"{ended}; see the logs", message(lost))


#: A launcher with a rank that ends well without having done anything.
EMPTY = """
print("[launch] process 1 spawned with command: ...")
print("[launch] Process 1 exits successfully.")
"""


def test_exit_code_0_counts_only_if_rank_0_did_its_work(tmp_path):
    ended = {}
    marks = "from trainer.runtime.process import mark_finished; mark_finished()"
    for name, rank in {"other": "", "ours": marks}.items():
        command = [sys.executable, "-c", EMPTY + rank]
        ended[name] = launcher_process.run_local(
            command, os.environ, tmp_path / "l.log", "trainer", 1
        )
        assert list(tmp_path.iterdir()) == [tmp_path / "l.log"]
    assert ended["ours"] == exit_report.ExitReport(0)
    assert ended["other"].code == 1
    assert "rank 0 did not finish its work" in ended["other"].message


def test_another_port_is_tried_once(tmp_path, monkeypatch):
    from launch import start

    port_taken = exit_report.describe(69, [], tmp_path / "l.log", lost=True, resumable=True)
    assert (port_taken.code, port_taken.port_taken) == (1, True)
    ports = []

    def run(command, *_):
        ports.append(parsed(command).master_port)
        return port_taken

    monkeypatch.setattr(launcher_process, "run_local", run)
    monkeypatch.setattr(launcher_command, "list_gpus", list)
    ending = start.start_ranks("trainer", ["r.yaml"], str(tmp_path), 2, None)
    assert ending == port_taken
    assert len(set(ports)) == 2


def test_a_single_rank_starts_without_the_launcher(tmp_path, monkeypatch):
    from launch import start

    commands = []

    def run(command, environment, *_):
        commands.append((command, environment))
        return exit_report.ExitReport(0)

    monkeypatch.setattr(launcher_process, "run_local", run)
    monkeypatch.setattr(launcher_command, "list_gpus", list)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a job around this command
    start.start_ranks("trainer", ["r.yaml"], str(tmp_path), 1, None)
    (command, environment), rank = commands[0], "--arguments-in-environment"
    assert command == [
        sys.executable,
        "-u",
        bootstrap.FILE,
        "--parent-death=SIGTERM",
        rank,
        "trainer",
    ]
    assert "WORLD_SIZE" not in environment


def test_a_killed_single_rank_is_named(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    module = tmp_path / "ends.py"
    module.write_text(code)
    devices = Devices("cpu", (0,))
    (tmp_path / "logs").mkdir()
    command, environment = launcher_command.direct_command(
        "ends", devices, launcher_command.environment(os.environ, devices, 1)
    )
    environment["PYTHONPATH"] = str(tmp_path)
    log = tmp_path / "logs" / "launcher.log"
    (tmp_path / "logs" / "stopped.txt").write_text("of an earlier start")
    report = launcher_process.run_local(command, environment, log, "trainer", 1)
    assert report.code == 1
    assert "rank 0 (process" in report.message
    assert "SIGKILL" in report.message
    assert not (tmp_path / "logs" / "stopped.txt").exists(), "status would not show the failure"


class _Clock:
    """A launcher that ends at its tenth look, half a minute from the first to the last."""

    pid = 0

    def __init__(self, stop, interrupts):
        self.looks, self._stop, self._interrupts = 0, stop, interrupts

    def poll(self):
        self.looks += 1
        self._stop.signals += [signal.SIGINT] * self._interrupts.count(self.looks)
        return 0 if self.looks == 10 else None

    def monotonic(self):
        return 3.0 * self.looks

    def sleep(self, seconds):
        pass


@pytest.mark.parametrize(
    ("interrupts", "killed"),
    [([1], False), ([1, 1, 1], False), ([1, 2, 3], False), ([1, 8], True), ([1, 2, 8], True)],
)
def test_only_a_repeated_ctrl_c_interrupts_a_save(monkeypatch, interrupts, killed):
    stop = launcher_process.StopSignals()
    clock = _Clock(stop, interrupts)
    monkeypatch.setattr(launcher_process, "time", clock)
    sent, forwarded = [], []
    monkeypatch.setattr(launcher_process, "signal_group", lambda _, number: sent.append(number))
    launcher_process.wait(clock, stop, forwarded.append, grace_seconds=600.0)
    assert forwarded == [signal.SIGINT]
    assert bool(sent) == killed


def test_launcher_messages_are_separated_from_rank_output():
    chatter = "[2026-01-02 03:04:05,678] [INFO] [launch.py:152:main] WORLD INFO DICT: {}"
    assert ssh.CHATTER.match(chatter)
    assert ssh.CHATTER.match(f"n1: {chatter}")
    assert not ssh.CHATTER.match("n1: step 5/10  loss 1.2")


def test_the_launcher_ignores_signals_that_its_ranks_handle():
    """Slurm signals every process of a step: the launcher would die and orphan its ranks."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: heard.append('TERM'))\n"
        "assert heard == []\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})\n"
        "print(heard)\n"
    )
    with launcher_process._blocked(launcher_process.STOPPING):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    output, _ = child.communicate(timeout=30)
    assert (child.returncode, output) == (0, "['TERM']\n")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_the_guard_ends_the_group_of_a_killed_parent():
    """kill -9 of promptshard: its guard sees the pipe close and ends the group."""
    group = subprocess.Popen(["sleep", "60"], start_new_session=True)
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\nfrom launch import launcher_process\n"
            f"with launcher_process.guarded({group.pid}):\n    print('ready', flush=True)\n"
            "    time.sleep(60)",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    assert group.poll() is None
    parent.kill()
    assert group.wait(timeout=20) == -signal.SIGTERM
    parent.wait()


def test_the_guard_spares_a_process_group_that_finished():
    group = subprocess.Popen(["sleep", "60"], start_new_session=True)
    with launcher_process.guarded(group.pid):
        pass
    time.sleep(0.3)
    assert group.poll() is None
    group.kill()
    group.wait()


# What the command line answers


COMMANDS = ["train", "validate", "submit", "status", "list", "generate", "inspect", "prepare"]
COMMANDS += ["chat", "export", "push", "predict", "sync"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_texts_explain_with_examples(command):
    done = promptshard(*command, "--help")
    assert done.returncode == 0
    assert "75 interrupted" in done.stdout
    assert not command or "Example" in done.stdout


def test_help_groups_all_commands():
    done = promptshard("--help")
    titles = re.findall(r"^╭─ (.+?) ─+╮$", done.stdout, re.MULTILINE)
    assert titles == ["Options", "Get started", "Train", "Compare", "Use a prompt"]


def test_validate_reports_the_rows_it_read(run_file):
    done = promptshard("validate", run_file, "training.steps=7", TINY_BASE)
    assert (done.returncode, done.stderr) == (0, "importing transformers\n")
    assert "OK (1 prompt, 1 task, 7 steps; base " in done.stdout


def test_validate_lists_the_prompts_of_a_sweep(run_file):
    done = promptshard("validate", run_file, "prompts.triage.sweep.seed=[0, 1, 2]", TINY_BASE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "sweep of 'triage': 3 prompts: triage-seed0, triage-seed1, triage-seed2",
        "importing transformers",
    ]
    assert "OK (3 prompts, 1 task, 5 steps; base " in done.stdout


def test_validate_notes_a_halving_that_stops_nothing(run_file):
    halving = ["search.halving.first=2", "tasks.triage.validation_share=0.2"]
    done = promptshard("validate", run_file, *halving, TINY_BASE)
    assert done.returncode == 0, done.stderr
    assert "search.halving: stops no prompt" in done.stderr


def test_validate_reports_what_only_the_tokenizer_shows(run_file):
    """Rows that are too long, and a variable that the chat template does not read."""
    long = "chest " * 600
    rows = [{"text": "a cold", "label": "other"}, {"text": long, "label": "heart"}]
    (run_file.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = promptshard("validate", run_file, TINY_BASE)
    assert done.returncode == 2
    assert "train.jsonl:2: has " in done.stderr
    variable = "tasks.triage.chat_template_kwargs.enable_thinking"
    settings = ["tasks.triage.chat=true", f"{variable}=false"]
    done = promptshard("validate", run_file, TINY_BASE, *settings)
    assert done.returncode == 2
    assert f"error: {variable}: the chat template reads no such variable" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("where", "code"), [("pipe", 0), ("/dev/full", 1), ("closed", 0)])
def test_only_a_full_disk_makes_lost_output_an_error(run_file, where, code):
    """``promptshard ... 2>&1 | head -1`` is fine; a result that is missing in a file is not."""
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-m", "launch", "validate", str(run_file), TINY_BASE]
    settings: dict[str, Any] = dict.fromkeys(
        ("stdout", "stderr"), writing if where == "pipe" else full
    )
    if where == "closed":
        settings = {"preexec_fn": lambda: [os.close(number) for number in (1, 2)]}
    sweep = "prompts.triage.sweep.seed=[0, 1, 2]"  # printed on stderr
    done = subprocess.run([*command, sweep], cwd=ROOT, timeout=200, **settings)
    os.close(writing)
    os.close(full)
    assert done.returncode == code


def test_a_command_whose_work_is_done_does_not_fail_when_its_output_is_lost():
    assert has_other_result(["train", "run.yaml"])
    assert has_other_result(["submit", "run.yaml"]), "an error would invite a second job"
    assert not has_other_result(["submit", "run.yaml", "--dry-run"])
    assert not has_other_result(["schema"])
    assert not has_other_result([])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_signal_before_ranks_are_started(number):
    code = (
        "import os, signal\nfrom launch import __main__ as program\n"
        f"signal.signal({number}, signal.SIG_DFL)\n"  # tests in the background ignore SIGINT
        f"program._run = lambda: os.kill(os.getpid(), {number})\n"
        "program.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 75
    assert done.stderr == "Stopped. Rerun the command.\n"


def test_a_second_stop_signal_changes_no_exit_code():
    code = (
        "import atexit, os, signal, sys\nfrom launch import __main__ as program\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "program._run = lambda: sys.exit(75)\n"
        "atexit.register(lambda: [os.kill(os.getpid(), n) for n in program.SIGNALS])\n"
        "program.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (75, "")


def test_a_working_directory_that_is_deleted(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, bootstrap.FILE, "launch", "status", "out"],
        cwd=folder,
        preexec_fn=folder.rmdir,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: the working directory is deleted; change to another one\n",
    )


def test_messages_show_no_password_and_control_no_terminal(run_file):
    done = promptshard("validate", run_file, "tracking.uri=htp://me:hunter22@host/\x1b]0;x\x07")
    assert done.returncode == 2
    assert "htp://***@host/" in done.stderr
    assert not {"\x1b", "\x07"} & set(done.stderr)
    assert "hunter22" not in done.stderr + done.stdout


@pytest.mark.parametrize("command", ["train", "validate", "generate", "inspect", "status", "sync"])
@pytest.mark.parametrize(
    "path", ["x" * 5000, "a/" * 2500, "~nosuchuser/x", "a\nb", os.fsdecode(b"\xff")]
)
def test_impossible_paths_are_refused(command, path):
    import launch.commands
    from launch import __main__ as program

    options = {"generate": ["--prompt", "a", "--input", "b"], "inspect": ["--base"]}
    words = [command, path, *options.get(command, [])]

    def run() -> None:
        program.check_arguments(words)
        launch.commands.app(words)

    with pytest.raises((SystemExit, BadInput)) as ended:
        run()
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 2


def broken_row(folder: Path) -> None:
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": "no label"}\n')


def missing_file(folder: Path) -> None:
    (folder / "train.jsonl").unlink()


def wrong_key(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rat: 0.01"))


def negative_learning_rate(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: -0.01"))


def no_base(folder: Path) -> None:
    (folder / "base" / "config.json").unlink()


def no_run_file(folder: Path) -> None:
    (folder / "run.yaml").unlink()


def output_is_a_file(folder: Path) -> None:
    (folder / "out").write_text("")


@pytest.mark.fault("typo or invalid value in the run file, port in use, GPU missing")
@pytest.mark.parametrize("command", ["train", "validate"])
@pytest.mark.parametrize(
    ("spoil", "where", "words"),
    [
        (wrong_key, "run.yaml:14", "learning_rat: unknown setting (did you mean 'learning_rate'?)"),
        (negative_learning_rate, "run.yaml:14", "learning_rate: -0.01 must be greater than 0"),
        (missing_file, "train.jsonl", ""),
        (broken_row, "train.jsonl:3", "label"),
        (no_base, "base.model", "is not a model folder (no config.json)"),
        (no_run_file, "run.yaml", "no such run file"),
        (output_is_a_file, "output_dir", "is a file; choose another folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_input_is_exit_code_2_at_once_in_one_message(run_file, command, spoil, where, words):
    spoil(run_file.parent)
    done = promptshard(command, run_file)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert where in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (run_file.parent / "out" / "logs").exists()


def test_several_problems_are_one_message(run_file):
    missing_file(run_file.parent)
    no_base(run_file.parent)
    done = promptshard("train", run_file)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: 2 problems"
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "RUN", "--no-such-option"],
        ["train", "RUN", "--processes", "many"],
        ["train", "RUN", "--processes", "0"],
        ["train", "RUN", "--hostfile", "nowhere"],
        ["train", "RUN", "--no-ssh"],
        ["train", "RUN", "--node-rank", "1"],
        ["train", "RUN", "--no-ssh", "--hostfile", "HOSTS"],
        ["train", "RUN", "--no-ssh", "--hostfile", "HOSTS", "--node-rank", "2"],
        ["generate", "nowhere", "--prompt", "a", "--input", "b"],
        ["inspect", "RUN"],
        ["inspect", "RUN", "--base", "--rows", "0"],
        ["inspect", "RUN", "--base", "--json", "nowhere/at/all.json"],
        ["sync", "nowhere"],
        ["no-such-command"],
    ],
)
def test_wrong_use_is_exit_code_2(run_file, arguments):
    hosts = run_file.parent / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    known = {"RUN": str(run_file), "HOSTS": str(hosts)}
    done = promptshard(*[known.get(word, word) for word in arguments])
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fault("typo or invalid value in the run file, port in use, GPU missing")
def test_a_port_in_use_and_missing_gpus_are_refused_before_ranks_start(run_file, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n")
    with socket.create_server(("", 0)) as used:
        port = str(used.getsockname()[1])
        words = ["--no-ssh", "--hostfile", str(hosts), "--node-rank", "0", "--master-port", port]
        done = promptshard("train", run_file, *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: --master-port: {port} cannot be used on this host: ")
    with pytest.raises(BadInput, match="--processes: 4 is more than the 3 visible GPUs"):
        launcher_command.choose_devices(4, [0, 1, 2])


def test_generate_lists_the_available_prompts(run_file, tmp_path):
    saved = tmp_path / "out"
    (saved / "prompts" / "triage").mkdir(parents=True)
    (saved / "run.yaml").write_text(run_file.read_text())
    preflight.check_result(str(saved), "triage")
    with pytest.raises(BadInput, match=r"did you mean 'triage'\?.*known: triage"):
        preflight.check_result(str(saved), "triaje")
    (saved / "prompts" / "triage").rmdir()
    with pytest.raises(BadInput, match="not saved yet"):
        preflight.check_result(str(saved), "triage")


def test_inspect_takes_a_run_its_folder_or_a_base(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = preflight.check_target(str(run_file), ["base.head=int8"])
    assert (config.base.head, config.output_dir) == ("int8", str(tmp_path / "out"))
    moved = tmp_path / "moved: here"
    moved.mkdir()
    (moved / "run.yaml").write_text(run_file.read_text())
    assert preflight.check_target(str(moved), []).output_dir == str(moved)
    for model in ("examples/tiny_base", "org/name"):
        base = preflight.check_target(model, ["base.revision=main"])
        assert (base.model, base.revision) == (model, "main")


@pytest.mark.parametrize(
    ("target", "overrides", "problem"),
    [
        ("nowhere.yaml", [], "nowhere.yaml: no such run file"),
        ("./nowhere", [], "no such file or folder; give a run file, a run's folder, or a model's"),
        ("examples/no_such_base", [], "no such file or folder"),
        ("examples", [], r"neither a run.yaml .* nor a config.json"),
        ("org/name", ["training.steps=5"], "'training.steps=5': training: unknown setting"),
        ("org/name", ["base.hed=int8"], "base.hed: unknown setting .did you mean 'head'"),
        ("RUN", ["base.head=int4"], "base.head: 'int4' is not one of keep, int8"),
    ],
)
def test_inspect_reports_its_arguments(run_file, monkeypatch, target, overrides, problem):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match=problem):
        preflight.check_target(str(run_file) if target == "RUN" else target, overrides)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["RUN"], "is a run file, which has no trained prompt"),
        (["examples/tiny_base"], "is a model; add --base"),
        (["nowhere"], "no such folder"),
        (["OUT"], "OUT: has no finished prompt; train the run to its end first"),
        (["OUT", "--prompt", "triaje"], "did you mean 'triage'?"),
        (["OUT", "base.head=int8"], "KEY=VALUE needs --base"),
        (["OUT", "--base", "--prune", "--prompt", "triage"], "--prompt, --prune: for prompts"),
        (["OUT", "--json", "nowhere/at/all.json"], "--json: cannot write into"),
        (["OUT", "--rows", "0"], "--rows"),
    ],
)
def test_inspect_refuses_what_it_cannot_inspect(
    run_file, tmp_path, monkeypatch, arguments, problem
):
    monkeypatch.chdir(ROOT)
    saved = tmp_path / "OUT"
    saved.mkdir()
    (saved / "run.yaml").write_text(run_file.read_text())
    known = {"RUN": str(run_file), "OUT": str(saved)}
    done = promptshard("inspect", *[known.get(word, word) for word in arguments])
    assert done.returncode == 2
    assert problem in done.stderr


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("org/name", None),
        ("name", None),
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("examples/no_such_base", "no such folder"),
    ],
)
def test_a_base_that_looks_like_a_folder_must_be_one(run_file, monkeypatch, model, problem):
    monkeypatch.chdir(ROOT)
    if problem is None:
        preflight.check_run(str(run_file), [f"base.model={model}"])
    else:
        with pytest.raises(BadInput, match=f"base.model: {model}: {problem}"):
            preflight.check_run(str(run_file), [f"base.model={model}"])


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "no such file"), ("{", "not valid JSON"), ("[]", "JSON object")]
)
def test_files_that_are_no_deepspeed_policy_are_refused(run_file, tmp_path, text, problem):
    policy = tmp_path / "policy.json"
    if text is not None:
        policy.write_text(text)
    with pytest.raises(BadInput, match=problem):
        preflight.check_run(str(run_file), [f"engine.deepspeed={policy}"])


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a/" * 3000, "~nosuchuser/x", "a\0b", "\udcff", "a\nb"]
)
def test_impossible_paths_are_bad_input(path):
    for check in (
        preflight.check_result,
        lambda path: preflight.check_target(path, []),
        lambda path: preflight.check_new_file(Path(path)),
    ):
        with pytest.raises(BadInput):
            check(path)


def test_the_start_of_ranks_is_reported_until_rank_0_has_its_log(tmp_path, monkeypatch, capsys):
    clock, log = [1000.0], tmp_path / "rank-0.log"
    log.touch()
    os.utime(log, (900, 900))  # of an earlier run
    monkeypatch.setattr(launcher_process.time, "time", lambda: clock[0])
    notice = launcher_process._StartNotice(log)
    for seconds in (1, 4, 5, 8, 9):
        clock[0] = 1000.0 + seconds
        notice.poll()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"importing deepspeed and starting the ranks: {n} s" for n in (4, 8)]
    os.utime(log, (1010, 1010))
    clock[0] = 1020.0
    notice.poll()
    clock[0] = 1040.0
    notice.poll()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags", [[], ["--verbose"], ["--fresh", "--verbose"]])
def test_verbose_reaches_the_ranks(tmp_path, monkeypatch, flags):
    from launch import commands

    passed: list[list[str]] = []

    def start_ranks(module, arguments, *_):
        passed.append(list(arguments))
        return exit_report.ExitReport(0)

    monkeypatch.setattr(commands, "start_ranks", start_ranks)
    for variable in START_VARIABLES:  # are restored after the test
        monkeypatch.setenv(variable, "")
    example = str(Path(__file__).resolve().parents[2] / "examples" / "quickstart.yaml")
    arguments = [example, f"output_dir={tmp_path / 'out'}"]
    result = CliRunner().invoke(commands.app, ["train", *arguments, *flags])
    assert result.exit_code == 0, result.output
    assert passed == [[*arguments, *flags]]


def test_a_second_start_is_refused_while_the_first_one_still_starts_its_ranks(
    run_file, monkeypatch
):
    """It would replace the launcher's log and load the base before its ranks are refused."""
    from launch import commands

    monkeypatch.setattr(commands, "start_ranks", None)
    for variable in START_VARIABLES:  # are restored after the test
        monkeypatch.setenv(variable, "")
    logs = run_file.parent / "out" / "logs"
    logs.mkdir(parents=True)
    (logs / "launcher.unfinished").write_text(Holder.here().to_json())
    result = CliRunner().invoke(commands.app, ["train", str(run_file)])
    assert f"{logs.parent} is in use by process {os.getpid()}" in str(result.exception)


@pytest.mark.parametrize(("steps", "starts"), [("5  # as before", 2), ("7", 1)])
def test_a_run_whose_file_was_changed_is_not_restarted_as_another_run(
    run_file, monkeypatch, steps, starts
):
    from launch import commands

    endings = [exit_report.ExitReport(1), exit_report.ExitReport(0)]

    def start_ranks(*_):
        run_file.write_text(run_file.read_text().replace("steps: 5", f"steps: {steps}"))
        return endings.pop(0)

    monkeypatch.setattr(commands, "start_ranks", start_ranks)
    for variable in START_VARIABLES:  # are restored after the test
        monkeypatch.setenv(variable, "")
    result = CliRunner().invoke(commands.app, ["train", str(run_file), "--max-restarts", "1"])
    assert len(endings) == 2 - starts
    assert ("was changed since the start" in str(result.exception)) == (starts == 1)


def test_the_ranks_know_the_options_that_started_them(run_file, monkeypatch, tmp_path):
    from launch import commands, ssh

    seen = []

    def start_ranks(*_):
        seen.append(os.environ[START_OPTIONS])
        return exit_report.ExitReport(0)

    monkeypatch.setattr(commands, "start_ranks", start_ranks)
    for variable in START_VARIABLES:  # are restored after the test
        monkeypatch.setenv(variable, "")
    (hosts := tmp_path / "my hosts").write_text("n1 slots=2\nn2 slots=2\n")
    for options in ([], ["--hostfile", str(hosts), "--fresh"], ["--processes", "3"]):
        CliRunner().invoke(commands.app, ["train", str(run_file), *options])
    assert seen == ["", f"--hostfile '{hosts}'", "--processes 3"]
    monkeypatch.setenv("HOME", str(tmp_path))
    exported = ssh._exported({START_OPTIONS: seen[1]}, tmp_path)["DS_ENV_FILE"]
    assert Path(exported).read_text() == f"{START_OPTIONS}=--hostfile '{hosts}'\n"
    unsafe = ssh._exported({START_OPTIONS: "--hostfile '$(id)'"}, tmp_path)
    assert Path(unsafe["DS_ENV_FILE"]).read_text() == "", "a shell would run it"


def test_verbose_is_no_part_of_the_recorded_command():
    from trainer.__main__ import _parser, shown_command

    args = _parser().parse_args(["r.yaml", "training.steps=5", "--verbose"])
    assert args.verbose
    assert shown_command(args) == "deepspeed --module trainer r.yaml training.steps=5"


def test_paths_with_a_leading_dash_reach_the_ranks_as_paths():
    """As in ``promptshard train -- -mine.yaml``."""
    paths = [arguments.as_path(path) for path in ("-mine.yaml", "mine.yaml", "-", "", None)]
    assert paths == ["./-mine.yaml", "mine.yaml", "-", "", None]
