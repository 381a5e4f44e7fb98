"""Fixtures of many files; marks tests with their folder: ``pytest -m unit`` runs tests/unit.

With ``-n 2`` (pytest-xdist) tests run beside each other, but no two that start a cluster or hosts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
FOLDERS = ("unit", "distributed", "faults", "gpu", "hosts", "slurm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file of unit tests stays on one worker; so do tests of ranks, and all others together."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file.startswith("tests/unit/"):
                return file
            return "ranks" if file.startswith("tests/distributed/") else "others"

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def threads_of_a_worker(request: pytest.FixtureRequest) -> None:
    """Workers share the cores."""
    workers = getattr(request.config, "workerinput", {}).get("workercount")
    if workers:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    import torch  # here, so that tests without it start at once

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a family's tiny model, written once; see ``save_family``."""
    from tests.family_bases import save_family

    @functools.cache
    def get(case: str, num_layers: int = 2) -> Path:
        return save_family(tmp_path_factory.mktemp(case), case, num_layers)

    return get
