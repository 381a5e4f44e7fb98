"""Run tests/gpu and count the outcomes."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.part import Check

ROOT = Path(__file__).resolve().parents[2]
#: Tests that run at a time: most of their time is start-up and compilation on the host.
WORKERS = 4


class Outcomes:
    """A pytest plugin that saves the outcomes after each test."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._counts: Counter[str] = Counter()
        self._failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
            if report.failed:
                self._failed.append(report.nodeid)
            self._check.save({"counts": dict(self._counts), "failed": self._failed})


def run_tests(check: Check) -> None:
    """Run the tests in this process.

    Raises:
        RuntimeError: if a test fails, or none was found.
    """
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    if not check.small and importlib.util.find_spec("xdist"):
        options += ["-n", str(WORKERS)]
    code = pytest.main([*options, str(ROOT / "tests" / "gpu")], plugins=[Outcomes(check)])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with exit code {int(code)}")
