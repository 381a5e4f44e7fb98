"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd in one folder.

Nothing outside the folder is read or written, so a Slurm that this machine belongs to is not
affected. The Debian packages slurm-wlm and munge contain everything needed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
START_SECONDS = 30
STOP_SECONDS = 10

#: Ranks meet by the names of nodes: these are addresses, as all of 127.0.0.0/8 is this machine.
NODES = ("127.0.0.1", "127.0.0.2")
CPUS = 8  # of each node, as far as Slurm knows: it does not look

#: cred_expire is also how long a requeued job waits before it may start again: 120 by default.
CONF = """\
ClusterName=promptshard-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerParameters=sched_interval=2,sched_min_interval=100000
SchedulerType=sched/builtin
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
InactiveLimit=0
MailProg=/bin/true
NodeName={nodes[0]} NodeHostname={host} Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why no Slurm can be started here, or None."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmctld and slurmd have to be started as root"
    return None


class Cluster:
    """``start`` starts it; every command runs with ``environment``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        paths = [self.environment.get("PATH", ""), "/usr/sbin", "/sbin"]
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join(paths),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        (self.folder / "state").mkdir()
        text = CONF.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            ports=free_ports(3),
            cpus=CPUS,
            nodes=NODES,
        )
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        where = {
            name: f"--{name}={self.folder}/munge.{name.split('-')[0]}"
            for name in ("socket", "key-file", "log-file", "pid-file", "seed-file")
        }
        self._daemon("munged", "--foreground", "--force", *where.values())
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self._states() == {"idle"}, "two idle nodes")

    def stop(self) -> None:
        """End all jobs, then the daemons, the last started first."""
        if len(self._daemons) > 1:
            subprocess.run(
                ["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=30
            )
            deadline = time.monotonic() + STOP_SECONDS
            while self.squeue(check=False) and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """Run a Slurm command; return its stdout."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def squeue(self, *, check: bool = True) -> str:
        """Return a line per job that has not ended."""
        return self.run("squeue", "--noheader", "--format=%i %T", check=check).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def _states(self) -> set[str]:
        shown = self.run("sinfo", "--noheader", "--Node", "--format=%t", check=False)
        return set(shown.split()) if len(shown.split()) == 2 else set()

    def _daemon(self, *command: str) -> None:
        name = "-".join(word.lstrip("-") for word in (command[0], *command[3:]) if "=" not in word)
        with (self.folder / f"{name}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not reached():
            ended = [d.args for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
                text = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)
                self.stop()
                raise RuntimeError(f"no {what} after {START_SECONDS} s; ended: {ended}\n{text}")
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """TCP ports that are free now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
