"""CPU cores and memory that a process may use: those of the machine, or fewer in a container.

Containers, Slurm and systemd limit a process with control groups: cgroups(7), in version 1 or 2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from trainer.runtime.process import read_text

#: Control groups of this process, one ``ID:CONTROLLERS:PATH`` per line, and where they are mounted.
OWN_GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Return the number of cores, rounded up if a limit is a fraction."""
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    for group in _groups("cpu"):
        of_version_1 = (read_text(f"{group}/cpu.cfs_{name}_us") for name in ("quota", "period"))
        quota, _, period = (read_text(f"{group}/cpu.max") or " ".join(of_version_1)).partition(" ")
        if quota.isdigit() and period.isdigit():  # no limit: "max", or "-1" in version 1
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def free_memory() -> int:
    """Return the bytes of memory that are free, or that the system would free when needed."""
    free = int(psutil.virtual_memory().available)
    for group in _groups("memory"):
        limit = read_text(f"{group}/memory.max") or read_text(f"{group}/memory.limit_in_bytes")
        used = read_text(f"{group}/memory.current") or read_text(f"{group}/memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            free = min(free, max(0, int(limit) - int(used) + _cached_files(group)))
    return free


def _cached_files(group: Path) -> int:
    lines = read_text(f"{group}/memory.stat").splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    names = ("active_file", "inactive_file")
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)  # total_: version 1


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of its parents, which limit it too."""
    for line in read_text(str(OWN_GROUPS)).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = MOUNT / controller if controllers else MOUNT  # version 1, version 2
        # In a container, the path may be that of the host, and the root is the container's group.
        group = root / path.lstrip("/")
        yield from [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
