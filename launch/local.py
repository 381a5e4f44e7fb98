"""What to start on this machine or on the hosts of a hostfile: devices, arguments, environment.

Everything here is a plain function of its arguments but ``list_gpus`` and ``free_port``, which look
at the machine. The DeepSpeed launcher's own rules are stated where they force a choice (0.19.8).
"""

from __future__ import annotations

import importlib.metadata
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

from trainer.errors import BadInput

CPU_PROCESSES = 2  # default without a GPU: the smallest number that shards
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
    """Where one host stands among those of a run that is started on each of them, without ssh.

    Attributes:
        rank: of this host among ``hosts``.
        address, port: where the ranks of all hosts meet: at the first host.
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
    """UUIDs of this machine's GPUs in PCI order, asked without torch; [] if torch has no CUDA."""
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
    """Ordinals of the GPUs that CUDA_VISIBLE_DEVICES lets through, in its order.

    As in CUDA, an entry is an ordinal or the start of a UUID, and -1 ends the list.
    """
    if visible is None:
        return list(range(len(uuids)))
    ids: list[int] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        if entry == "-1":
            break
        matches = [i for i, uuid in enumerate(uuids) if entry == str(i) or uuid.startswith(entry)]
        if entry.startswith("MIG-"):
            raise BadInput(
                f"CUDA_VISIBLE_DEVICES={visible}: the deepspeed launcher takes no MIG instances"
            )
        if len(matches) != 1:
            raise BadInput(
                f"CUDA_VISIBLE_DEVICES={visible}: no GPU {entry!r} here; found {len(uuids)}"
            )
        ids += matches
    return ids


def choose_devices(processes: int | None, gpus: Sequence[int]) -> Devices:
    """All GPUs, or ``processes`` of them; without a GPU that many (default 2) CPU processes."""
    if processes is not None and processes < 1:
        raise BadInput(f"--processes: {processes} is not a number of processes; give 1 or more")
    if not gpus:
        return Devices("cpu", tuple(range(processes or CPU_PROCESSES)))
    if processes is not None and processes > len(gpus):
        raise BadInput(
            f"--processes: {processes} is more than the {len(gpus)} visible GPUs; give at most "
            f"{len(gpus)}, or set CUDA_VISIBLE_DEVICES= (empty) to run on CPU"
        )
    return Devices("cuda", tuple(gpus[:processes]))


def read_hostfile(path: str) -> list[Host]:
    """The hosts of a DeepSpeed hostfile, one ``name slots=N`` a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--hostfile: cannot read {path}: {getattr(error, 'strerror', None) or error}; write a "
            "file with one HOST slots=GPUS a line"
        ) from None
    hosts: list[Host] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line.strip())
        if match is None:
            problems.append(f"{path}:{number}: {line.strip()!r}: write HOST slots=NUMBER")
        elif match[1] in [host.name for host in hosts]:
            problems.append(f"{path}:{number}: host {match[1]} stands here twice; add its slots up")
        else:
            hosts.append(Host(match[1], int(match[2])))
    if problems or not hosts:
        raise BadInput(problems or f"{path}: names no host; write one HOST slots=NUMBER a line")
    return hosts


def is_local(hosts: Sequence[Host]) -> bool:
    """Whether a hostfile means this machine alone, so that no ssh is needed."""
    return len(hosts) == 1 and hosts[0].name in (*LOCAL_NAMES, socket.gethostname())


def check_remote(arguments: Sequence[str]) -> None:
    """What a launch over ssh needs. The launcher hands arguments to remote shells half quoted."""
    problems = [
        f"{text!r}: the launcher cannot hand this over ssh unchanged; write it into the run file"
        for text in arguments
        if not re.fullmatch(r"[\w@%+=:,./\-\[\] ]+", text)
    ]
    for tool in ("pdsh", "ssh"):
        if shutil.which(tool) is None:
            problems.append(
                f"--hostfile: {tool} is not installed; the launcher reaches hosts with it"
            )
    if problems:
        raise BadInput(problems)


def local_arguments(
    module: str,
    arguments: Sequence[str],
    devices: Devices,
    port: int,
    *,
    python: str = sys.executable,
) -> list[str]:
    """The command that starts ``python -m module arguments`` once per device of this machine.

    ``--num_gpus N`` means GPUs 0..N-1 whatever CUDA_VISIBLE_DEVICES says, so GPUs are named with
    ``--include``. On CPU the launcher counts NUMA nodes, which ``--num_gpus`` overrides.
    """
    if devices.kind == "cuda":
        where = ["--include", "localhost:" + ",".join(map(str, devices.ids))]
    else:
        where = ["--num_gpus", str(len(devices.ids))]
    # No hostfile: the launcher's default, /job/hostfile, may be there and would win.
    where += ["--hostfile", os.devnull]
    return [*_launcher(python), *where, *_program(module, arguments, port)]


def hostfile_arguments(
    module: str,
    arguments: Sequence[str],
    hostfile: str,
    processes: int | None,
    port: int,
    *,
    python: str = sys.executable,
) -> list[str]:
    """The same over all hosts of a hostfile; ``processes`` counts those of one host."""
    where = ["--hostfile", hostfile]
    if processes is not None:
        where += ["--num_gpus", str(processes)]
    where.append("--force_multi")  # else one remote host would count as this machine
    return [*_launcher(python), *where, *_program(module, arguments, port)]


def place_arguments(
    module: str,
    arguments: Sequence[str],
    hostfile: str,
    place: Place,
    devices: Devices,
    *,
    python: str = sys.executable,
) -> list[str]:
    """The same for this host's part of a run that is started on every host.

    The launcher numbers the devices of a host from 0 unless ``--include`` names them. Of other
    hosts it reads only how many they are.
    """
    where = ["--hostfile", hostfile]
    if devices.ids != tuple(range(place.host.slots)):
        chosen = {host.name: range(host.slots) for host in place.hosts} | {
            place.host.name: devices.ids
        }
        named = [f"{name}:{','.join(map(str, ids))}" for name, ids in chosen.items()]
        where += ["--include", "@".join(named)]
    where += ["--no_ssh", "--node_rank", str(place.rank), "--master_addr", place.address]
    return [*_launcher(python), *where, *_program(module, arguments, place.port)]


def launcher_hostfile(place: Place, devices: Devices) -> str:
    """A hostfile for ``place_arguments``: it has a slot for every device that is named there."""
    slots = max(*devices.ids, place.host.slots - 1) + 1
    sizes = {host.name: host.slots for host in place.hosts} | {place.host.name: slots}
    return "".join(f"{name} slots={count}\n" for name, count in sizes.items())


def environment(environ: Mapping[str, str], devices: Devices, cores: int) -> dict[str, str]:
    """The launcher's environment: threads that share the cores, and the accelerator it must see."""
    result = dict(environ)
    result.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(devices.ids))))
    result.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher sets it for the ranks
    if devices.kind == "cuda":
        result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order in which list_gpus counts
    else:
        result.setdefault("DS_ACCELERATOR", "cpu")
    return result


def by_hand(command: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(["deepspeed", *command[len(_launcher("")) :]])


def free_port() -> int:
    """A TCP port that nobody listens on now, for the ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _launcher(python: str) -> list[str]:
    return [python, "-m", "deepspeed.launcher.runner"]


def _program(module: str, arguments: Sequence[str], port: int) -> list[str]:
    return ["--master_port", str(port), "--no_local_rank", "--module", module, *arguments]
