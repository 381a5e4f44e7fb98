"""Two hosts on this machine: network namespaces, connected by a virtual cable.

A run is started on each with ``promptshard train --no-ssh``. First the cable is cut while it
trains: both hosts stop and report the lost rank. The same commands then resume from the last
checkpoint and end equal to a run on one machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
IP = shutil.which("ip", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]))
ADDRESSES = ("10.213.77.1", "10.213.77.2")
TIMEOUT_SECONDS = 15  # of a wait for another rank
SETTINGS = [
    *("examples/quickstart.yaml", "training.steps=30", "checkpoint.every=2", "evaluation.every=15"),
    *(f"tasks[{i}].hand_written=[]" for i in (0, 1)),
    *(f"tasks[{i}].max_validation_rows=20" for i in (0, 1)),
    f"engine.timeout_seconds={TIMEOUT_SECONDS}",
]


class Hosts:
    """Two network namespaces, named after this process."""

    def __init__(self) -> None:
        self.names = tuple(f"promptshard-{os.getpid()}-{i}" for i in (0, 1))
        self.links = tuple(f"ps{os.getpid() % 100000:05d}{i}" for i in (0, 1))

    def make(self) -> None:
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            self.ip("link", "set", link, "netns", name)
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.cable("up")

    def cable(self, state: str) -> None:
        for name, link in zip(self.names, self.links, strict=True):
            self.ip("-n", name, "link", "set", link, state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run([IP or "ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run([IP or "ip", "link", "del", self.links[0]], capture_output=True, check=False)

    def ip(self, *words: str) -> None:
        done = subprocess.run([IP or "ip", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        if IP is None:
            raise OSError("no `ip` (Debian: apt-get install iproute2)")
        made.make()
    except OSError as error:
        made.remove()
        warnings.warn(f"NO TEST RUNS ON SEVERAL HOSTS: {error}", stacklevel=1)
        pytest.skip(f"no network namespaces: {error}")
    try:
        yield made
    finally:
        made.remove()


@contextmanager
def started(*commands: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start commands; kill those that are still running at the end."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(output: Path, *options: str) -> list[str]:
    settings = [*SETTINGS, f"output_dir={output}"]
    return [sys.executable, "-m", "launch", "train", *settings, *options]


def train_on(hosts: Hosts, hostfile: Path, output: Path) -> list[list[str]]:
    """The command of each host."""
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    options = ["--hostfile", str(hostfile), "--no-ssh", "--node-rank"]
    return [
        [IP or "ip", "netns", "exec", name, *train(output, *options, str(rank))]
        for rank, name in enumerate(hosts.names)
    ]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    # Nothing is compiled for this base: CXX names no compiler.
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CXX": "none"}


#: The process that sends metrics ends this long after its run, at the latest.
SENDER_SECONDS = 60


def inhabitants(name: str) -> list[str]:
    """Command lines of the processes of a host."""
    shown = subprocess.run([IP or "ip", "netns", "pids", name], capture_output=True, text=True)
    lines = []
    for pid in shown.stdout.split():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            lines.append(f"{pid} {' '.join(words)}")
    return lines


@pytest.fixture(scope="module")
def results(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Output folders of the runs on two hosts and on one; output of each host after the cut."""
    folder = tmp_path_factory.mktemp("hosts")
    one, two = folder / "one", folder / "two"
    commands = train_on(hosts, folder / "hosts", two)
    with started(*commands) as processes:
        deadline = time.monotonic() + 120
        while not list((two / "checkpoints").glob("step-*")):
            ended = [
                process.communicate()[0] for process in processes if process.poll() is not None
            ]
            assert not ended, "\n".join(ended)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        hosts.cable("down")
        # While the hosts wait for each other, the run on one machine has the cores.
        with started(train(one, "--processes", "2")) as (local,):
            outputs = [process.communicate(timeout=8 * TIMEOUT_SECONDS)[0] for process in processes]
            codes = [process.returncode for process in processes]
            deadline = time.monotonic() + SENDER_SECONDS
            while left := [line for name in hosts.names for line in inhabitants(name)]:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            text = local.communicate(timeout=300)[0]
            assert local.returncode == 0, text
    hosts.cable("up")
    with started(*commands) as processes:
        again = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], again
    assert "resuming from step" in again[0]
    return {"two": two, "one": one, "outputs": outputs, "codes": codes, "left": left}


@pytest.mark.timeout(600)
def test_a_cut_connection_ends_both_hosts_and_each_names_the_other(results: Any) -> None:
    for rank, (output, code) in enumerate(zip(results["outputs"], results["codes"], strict=True)):
        assert code in (1, 75), output
        assert f"lost: no answer from {ADDRESSES[1 - rank]}" in output, output
    assert results["left"] == []


def test_going_on_over_two_hosts_equals_a_run_on_one(results: Any) -> None:
    for path in results["one"].glob("prompts/**/adapter_model.safetensors"):
        other = results["two"] / path.relative_to(results["one"])
        for name, tensor in load_file(path).items():
            assert load_file(other)[name] == pytest.approx(tensor, abs=1e-5), path
    summary = json.loads((results["two"] / "summary.json").read_text())
    assert (summary["status"], summary["world_size"], summary["steps"]) == ("finished", 2, 30)
