"""Build the commands that start ranks: devices, hosts, arguments, environment."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.runtime import bootstrap
from trainer.runtime.errors import BadInput
from trainer.runtime.process import WAITING_THREADS
from trainer.runtime.redact import redact

CPU_PROCESSES = 2  # default without a GPU: the smallest number with sharding
MAX_CPU_PROCESSES = 1024  # per machine; each uses hundreds of megabytes
#: Entries of CUDA_VISIBLE_DEVICES that mean no GPU; Slurm writes NoDevFiles for a job without any.
NO_GPU = ("-1", "none", "void", "nodevfiles")
MAX_HOSTFILE = 1 << 20  # characters
#: ``[USER@]HOST``; no leading dash, which ssh would read as an option.
HOST_NAME = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_:\[][\w.:\[\]%-]*", re.ASCII)
LOCAL_NAMES = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Devices:
    """The devices of one machine, one process each. ``ids`` are CUDA ordinals, or 0..N-1 on CPU."""

    kind: Literal["cuda", "cpu"]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


@dataclass(frozen=True)
class Place:
    """Position of this host in a run that is started on every host without ssh.

    Attributes:
        address, port: rendezvous of all ranks, on the first host.
    """

    hosts: tuple[Host, ...]
    rank: int
    address: str
    port: int

    @property
    def host(self) -> Host:
        return self.hosts[self.rank]

    @property
    def others(self) -> tuple[Host, ...]:
        return self.hosts[: self.rank] + self.hosts[self.rank + 1 :]


def list_gpus() -> list[str]:
    """Return UUIDs of this machine's GPUs in PCI order, without torch; [] if torch has no CUDA."""
    tool = shutil.which("nvidia-smi")
    try:
        if tool is None or importlib.metadata.version("torch").endswith("+cpu"):
            return []
        listing = subprocess.run(
            [tool, "-L"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError, importlib.metadata.PackageNotFoundError):
        return []
    return re.findall(r"^GPU \d+:.*\(UUID: (GPU-[^)]+)\)", listing.stdout, flags=re.MULTILINE)


def visible_gpus(uuids: Sequence[str], visible: str | None) -> list[int]:
    """Return the ordinals of the GPUs that CUDA_VISIBLE_DEVICES lists, in its order.

    As in CUDA, an entry is an ordinal or the start of a UUID, and an entry of ``NO_GPU`` ends the
    list.
    """
    if visible is None:
        return list(range(len(uuids)))
    ids: list[int] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        if entry.lower() in NO_GPU:
            break
        matches = [i for i, uuid in enumerate(uuids) if entry == str(i) or uuid.startswith(entry)]
        if entry.startswith("MIG-"):
            raise BadInput(f"CUDA_VISIBLE_DEVICES={visible}: MIG instances are not supported")
        if len(matches) != 1:
            raise BadInput(
                f"CUDA_VISIBLE_DEVICES={visible}: no GPU {entry!r} here; found {len(uuids)}; unset "
                "it, or leave it empty to run on CPU"
            )
        ids += matches
    return ids


def choose_devices(processes: int | None, gpus: Sequence[int]) -> Devices:
    """Return all GPUs or the first ``processes``; without GPUs, CPU processes (default 2)."""
    if processes is not None and processes < 1:
        raise BadInput(f"--processes: {processes} is not a positive integer")
    if not gpus and processes is not None and processes > MAX_CPU_PROCESSES:
        raise BadInput(f"--processes: {processes} is more than {MAX_CPU_PROCESSES}; give fewer")
    if not gpus:
        return Devices("cpu", tuple(range(processes or CPU_PROCESSES)))
    if processes is not None and processes > len(gpus):
        raise BadInput(
            f"--processes: {processes} is more than the {len(gpus)} visible GPUs; give at most "
            f"{len(gpus)}, or set CUDA_VISIBLE_DEVICES= (empty) to run on CPU"
        )
    return Devices("cuda", tuple(gpus[:processes]))


def read_hostfile(path: str) -> list[Host]:
    """Read the hosts of a DeepSpeed hostfile, one ``name slots=N`` per line."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_HOSTFILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--hostfile: cannot read {path}: {getattr(error, 'strerror', None) or error}; write a "
            "file with one HOST slots=GPUS per line"
        ) from None
    if len(text) > MAX_HOSTFILE:
        raise BadInput(f"--hostfile: {path} has more than {MAX_HOSTFILE:,} characters")
    hosts: list[Host] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d{0,5})", line.strip(), re.ASCII)
        if match is None:
            problems.append(f"{path}:{number}: {line.strip()[:200]!r}: write HOST slots=NUMBER")
        elif not HOST_NAME.fullmatch(match[1]):
            problems.append(
                f"{path}:{number}: {match[1]!r} is not a host name or address; ssh would read "
                "other characters as an option or a command"
            )
        elif match[1] in [host.name for host in hosts]:
            problems.append(f"{path}:{number}: duplicate host {match[1]}; add up its slots")
        else:
            hosts.append(Host(match[1], int(match[2])))
    if problems or not hosts:
        raise BadInput(problems or f"{path}: has no hosts; write one HOST slots=NUMBER per line")
    return hosts


def is_local(hosts: Sequence[Host]) -> bool:
    """Whether a hostfile lists only this machine, so that ssh is not needed."""
    return len(hosts) == 1 and hosts[0].name in (*LOCAL_NAMES, socket.gethostname())


def check_remote(arguments: Sequence[str]) -> None:
    """Check arguments that the launcher passes over ssh, which quotes only some and logs all.

    Raises:
        BadInput: arguments would be altered or show a password, or tools are missing; names all.
    """
    problems = []
    for text in arguments:
        if redact(text) != text:
            problems.append(
                f"{redact(text)!r}: ssh would show the password to everyone on these hosts; write "
                "it into the run file, or into ~/.mlflow/credentials"
            )
        elif not re.fullmatch(r"[\w@%+=:,./\-\[\] ]+", text):
            problems.append(
                f"{text!r}: the launcher cannot pass this over ssh unchanged; write it into the "
                "run file"
            )
    problems += [
        f"--hostfile: {tool} is not installed; the launcher reaches hosts with it"
        for tool in ("pdsh", "ssh")
        if shutil.which(tool) is None
    ]
    if problems:
        raise BadInput(problems)


def local_command(module: str, devices: Devices, port: int) -> list[str]:
    """Return the command that runs a module once per device of this machine."""
    return _per_node(module, {"localhost": devices.ids}, 0, "127.0.0.1", port)


def direct_command(
    module: str, devices: Devices, environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return command and environment that run a module as the only rank, without a launcher."""
    own = {k: v for k, v in environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if devices.kind == "cuda":
        own["CUDA_VISIBLE_DEVICES"] = str(devices.ids[0])
    options = ("--parent-death=SIGTERM", "--arguments-in-environment", module)
    return [sys.executable, "-u", bootstrap.FILE, *options], own


def place_command(module: str, place: Place, devices: Devices) -> list[str]:
    """Return the command for this host's ranks of a run that is started on every host.

    For the other hosts, only the number of device IDs matters to the launcher.
    """
    ids = {host.name: tuple(range(host.slots)) for host in place.hosts}
    ids |= {place.host.name: devices.ids}
    return _per_node(module, ids, place.rank, place.address, place.port)


def hostfile_command(
    module: str, arguments: Sequence[str], hostfile: str, processes: int | None, port: int
) -> list[str]:
    """Return the command that runs a module on all hosts of a hostfile, over ssh.

    The launcher prepends its working directory to the import path on all hosts, so it runs in this
    project's folder, and the ranks change back to the user's working directory.

    ``processes`` is the number of ranks per host; None for the hostfile's slots.
    """
    where = ["--hostfile", os.path.abspath(hostfile)]
    if processes is not None:
        where += ["--num_gpus", str(processes)]
    where.append("--force_multi")  # otherwise a single remote host would count as this machine
    where += ["--master_port", str(port), "--no_local_rank"]
    rank = [bootstrap.FILE, f"--chdir={os.getcwd()}", module, *arguments]
    return [*bootstrap.command("deepspeed.launcher.runner"), *where, *rank]


def by_hand(
    module: str, arguments: Sequence[str], devices: Devices | None, hostfile: str | None
) -> str:
    """Return the ``deepspeed`` command that starts the same ranks by hand, without passwords."""
    if hostfile is not None:
        where = ["--hostfile", hostfile]
    elif devices is not None and devices.kind == "cuda":
        where = ["--include", "localhost:" + ",".join(map(str, devices.ids))]
    else:
        where = ["--num_gpus", str(len(devices.ids) if devices else CPU_PROCESSES)]
    return redact(shlex.join(["deepspeed", *where, "--module", module, *arguments]))


def environment(
    environ: Mapping[str, str], devices: Devices, cores: int, arguments: Sequence[str] = ()
) -> dict[str, str]:
    """Return the launcher's environment: threads per rank, accelerator, arguments of the ranks."""
    result = dict(environ) | bootstrap.arguments_in_environment(list(arguments))
    result[bootstrap.PARENT] = str(os.getpid())
    result.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(devices.ids))))
    result.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher sets it per rank
    result.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # DeepSpeed requires it to equal LOCAL_RANK
    if devices.kind == "cuda":
        result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order of list_gpus
        # without it, ranks would run on the CPU if torch cannot use the GPUs
        result.setdefault("DS_ACCELERATOR", "cuda")
    else:
        result = {"DS_ACCELERATOR": "cpu"} | WAITING_THREADS | result
    return result


def free_port() -> int:
    """Return a free TCP port for the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _per_node(
    module: str, ids: Mapping[str, Sequence[int]], node_rank: int, address: str, port: int
) -> list[str]:
    """Return the command of ``launch.local_launcher``, which starts the ranks of one host."""
    world = json.dumps({name: list(devices) for name, devices in ids.items()})
    return [
        *bootstrap.command("launch.local_launcher", "--parent-death=SIGKILL"),
        "--world_info=" + base64.urlsafe_b64encode(world.encode()).decode(),
        f"--node_rank={node_rank}",
        f"--master_addr={address}",
        f"--master_port={port}",
        "--no_local_rank",
        *(bootstrap.FILE, "--parent-death=SIGTERM", "--arguments-in-environment", module),
    ]
