"""Shared fixtures and collection hooks.

Every test is marked with its folder: ``pytest -m unit`` runs tests/unit. With ``-n 2``
(pytest-xdist), one worker runs all tests of a scope (``_scope``), the longest scopes first.
``pytest --list-faults`` prints which test reproduces which failure (``@pytest.mark.fault``).
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

# MLflow would report its use, and set the second variable, which processes of tests inherit.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("_MLFLOW_TELEMETRY_SESSION_ID", None)

TESTS = Path(__file__).parent
FOLDERS = ("unit", "distributed", "faults", "gpu", "hosts", "slurm")
CLUSTERS = ("tests/hosts/", "tests/slurm/")
DOCUMENTS = "tests/distributed/test_readme.py"
#: Scopes of tests that start processes. Those of clusters mostly wait, so they start first.
SCOPES = ("clusters", "ranks", "documents", "others")
#: Unit test files with every family. One worker runs them: importing all families of transformers
#: and saving their models takes long.
FAMILY_FILES = (
    "test_families.py",
    "test_like_transformers.py",
    "test_saved_tensors.py",
    "test_prefix_tuning.py",
    "test_scoring.py",
)
#: Unit test files by the CPU time they take, the longest first.
SLOW_FILES = (
    *FAMILY_FILES,
    "test_other_device.py",
    "test_launch.py",
    "test_gguf_bases.py",
    "test_fused_ops.py",
    "test_metrics.py",
    "test_flex.py",
    "test_quantized_bases.py",
    "test_architecture.py",
    "test_report.py",
    "test_tokenizer.py",
    "test_generation.py",
    "test_inspect_prompts.py",
    "test_freed_memory.py",
)
#: Tests that ``make test-oldest`` runs: these files, in some of them only the tests of these
#: families, and the quickstart.
OLDEST_FILES = (
    *("test_chat.py", "test_chat_placement.py", "test_chat_settings.py", "test_chat_templates.py"),
    *("test_export_command.py", "test_families.py", "test_generation.py"),
    *("test_like_transformers.py", "test_peft_adapter.py", "test_stock_templates.py"),
    *("test_tokenize.py", "test_tokenizer.py"),
)
OLDEST_FAMILIES = (
    *("gemma", "gemma2", "gemma3", "gpt2", "gpt_oss", "llama", "mistral", "mixtral", "opt", "phi"),
    *("phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--list-faults",
        action="store_true",
        help="list the failures that tests reproduce, with their tests, and run nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--list-faults"):
        config.option.collectonly = True
        config.option.markexpr = "fault"
        config.option.verbose = min(config.option.verbose, -2)  # no tree of tests


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the list of ``--list-faults``: each failure once, with its tests."""
    if not config.getoption("--list-faults"):
        return
    tests: dict[str, set[str]] = {}
    for item in terminalreporter._session.items:
        for mark in item.iter_markers("fault"):
            tests.setdefault(mark.args[0], set()).add(item.nodeid.partition("[")[0])
    for fault in sorted(tests):
        terminalreporter.write_line(fault)
        for test in sorted(tests[fault]):
            terminalreporter.write_line(f"  {test}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all modules without garbage collection, and leave them out of it afterwards.

    Python would look through all objects of torch and transformers again and again. Searching the
    newer ones less often than by default saves time, too.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests with their folder; with xdist run long ones first, so that no worker idles."""
    if hasattr(config, "workerinput"):
        items.sort(key=_place)
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)
        if _is_of_oldest(item):
            item.add_marker("oldest")


def _is_of_oldest(item: pytest.Item) -> bool:
    if item.path.name == "test_readme.py":
        return item.name.startswith("test_quickstart_")
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case", "llama") if callspec else "llama"
    # transformers 5.0 holds a tied head twice if it is stored; the values are the same.
    ties = "TestTies" in item.nodeid
    unit = item.path.parent.name == "unit" and item.path.name in OLDEST_FILES
    return unit and case in OLDEST_FAMILIES and not ties


def _scope(nodeid: str) -> str:
    """The tests that share a worker with this one, and so its fixtures and imports.

    The scopes are the unit test files with every family, each other unit test file, each test of
    tests/gpu, and ``SCOPES``: the tests of clusters, the rest of tests/distributed, the documents,
    and all others.
    """
    file = nodeid.split("::")[0]
    if file.startswith("tests/unit/"):
        return "families" if file.endswith(FAMILY_FILES) else file
    if file.startswith("tests/gpu/"):
        return nodeid  # most of their time is compilation on the host
    if file == DOCUMENTS:
        return "documents"
    if file.startswith("tests/distributed/"):
        return "ranks"
    return "clusters" if file.startswith(CLUSTERS) else "others"


def _place(item: pytest.Item) -> int:
    """Tests that start processes, then tests/gpu, then slow files, then the others."""
    scope, name = _scope(item.nodeid), item.path.name
    if scope in SCOPES:
        return SCOPES.index(scope)
    slow = SLOW_FILES.index(name) + 1 if name in SLOW_FILES else len(SLOW_FILES) + 1
    return len(SCOPES) + (slow if item.path.parent.name == "unit" else 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one worker per core for ``-n auto``, and one more for tests that mostly wait.

    Cluster tests mostly wait for Slurm and timeouts. An extra worker uses the idle cores.
    """
    paths = [Path(argument.partition("::")[0]) for argument in config.args]
    units_alone = all("unit" in path.parts for path in paths)
    return len(os.sched_getaffinity(0)) + (0 if units_alone else 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests into scopes, each of which one worker runs."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False  # keep the order of the collection
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Run torch on one thread: tiny models are slower on several."""
    if "torch" in sys.modules:  # imported by a test file
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a family's tiny model once and returns its folder."""
    from tests.family_bases import save_family

    @functools.cache
    def get(case: str, num_layers: int = 2) -> Path:
        return save_family(tmp_path_factory.mktemp(case), case, num_layers)

    return get
