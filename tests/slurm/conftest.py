"""A Slurm for all tests of this folder, and folders to submit from."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        warnings.warn(f"NO TEST RUNS ON A REAL SLURM: {why}", stacklevel=1)
        pytest.skip(f"no Slurm: {why}")
    # not pytest's folder: a socket's path has at most 107 characters
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        slurm = Cluster(Path(folder))
        slurm.start()
        try:
            yield slurm
        finally:
            slurm.stop()


class Desk:
    """A folder like a clone of the repository, from which jobs are submitted."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self.path, self.cluster = path, cluster
        for name in ("trainer", "launch", "ds_configs", "examples"):
            (path / name).symlink_to(ROOT / name)
        (path / ".venv").symlink_to(Path(sys.executable).parents[1])
        kept = {k: v for k, v in cluster.environment.items() if not k.startswith("MLFLOW_")}
        self.environment = kept | {"PYTHONPATH": str(ROOT)}

    def promptshard(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch", *words],
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def sbatch(self, script: Path) -> str:
        environ = {k: v for k, v in self.environment.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            cwd=self.path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Desk:
    # letters that sbatch and shells read as something else; not ', which MLflow 3.17 trips over
    path = tmp_path_factory.mktemp("desk") / '100% "mine" $HOME'
    path.mkdir()
    return Desk(path, cluster)


def until(reached: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def alive_in(job: str) -> list[int]:
    """Return processes whose environment names this job."""
    wanted = f"SLURM_JOB_ID={job}".encode()
    pids = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if wanted in (process / "environ").read_bytes().split(b"\0"):
                    pids.append(int(process.name))
            except OSError:
                continue
    return pids


def nothing_left_of(job: str) -> bool:
    """Return whether no process of this ended job exists; Slurm may still be killing some."""
    until(lambda: not alive_in(job), 10, lambda: str([_command(pid) for pid in alive_in(job)]))
    return True


def _command(pid: int) -> str:
    return read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")
