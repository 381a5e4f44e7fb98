"""Cores and memory of a process in control groups, of version 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.runtime import limits
from trainer.runtime.limits import free_memory, num_cores

GB = 10**9


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the groups of a machine with 64 cores and 256 GB of free memory are mounted."""
    monkeypatch.setattr(limits, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    machine = SimpleNamespace(available=256 * GB)
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: machine)
    return tmp_path / "mount"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_groups_the_machine_is_the_limit(mount: Path) -> None:
    assert (num_cores(), free_memory()) == (64, 256 * GB)


@pytest.mark.parametrize("path", ["/", "/outer/inner", "/docker/of-the-host"])
def test_version_2(mount: Path, tmp_path: Path, path: str) -> None:
    """The limit may be that of a parent, or of a container that sees the path of the host."""
    write(tmp_path, groups=f"0::{path}")
    stat = f"anon 1\ninactive_file {2 * GB}\nactive_file {GB}"
    write(mount, cpu__max="350000 100000", memory__max=str(16 * GB))
    write(mount, memory__current=str(6 * GB), memory__stat=stat)
    write(mount / "outer" / "inner", cpu__max="max 100000", memory__max="max")
    write(mount / "outer" / "inner", memory__current=str(GB))
    assert (num_cores(), free_memory()) == (4, 13 * GB)
    write(mount, memory__current=str(20 * GB))
    assert free_memory() == 0


def test_version_1(mount: Path, tmp_path: Path) -> None:
    write(tmp_path, groups="9:name=systemd:/job\n4:memory:/job\n3:cpu,cpuacct:/job\n0::/")
    cpu, memory = mount / "cpu" / "job", mount / "memory" / "job"
    write(cpu, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(memory, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="7")
    assert (num_cores(), free_memory()) == (64, 256 * GB)
    write(cpu, cpu__cfs_quota_us="200000")
    stat = f"total_inactive_file {GB}\ntotal_active_file 0\ninactive_file 3\nactive_file 3"
    write(memory, memory__limit_in_bytes=str(8 * GB), memory__stat=stat)
    write(memory, memory__usage_in_bytes=str(2 * GB))
    assert (num_cores(), free_memory()) == (2, 7 * GB)
