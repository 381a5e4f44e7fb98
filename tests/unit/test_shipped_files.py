"""Everything a person may copy works: run files, DeepSpeed policies, README links and commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from launch import preflight
from trainer.config import load, resolve_path
from trainer.data.splits import check_rows

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted([*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yml")])
POLICIES = sorted((ROOT / "ds_configs").rglob("*.json"))
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]

#: Programs whose every README command is run by tests/distributed/test_readme.py.
RUN_BY_TESTS = {"promptshard", "deepspeed", "mlflow"}
#: Other commands of a fenced block, and what runs them. A new one fails here until it is added.
COMMANDS = {
    "sbatch slurm/cpu-smoke-test.sbatch": "tests/slurm/test_training.py, on a real Slurm",
    ".venv/bin/python slurm/render.py": "its function is compared in tests/unit/test_slurm.py",
    ".venv/bin/python -m tests.golden": "the same runs, in tests/distributed",
    "make quickstart": "the same train command, in tests/distributed/test_readme.py",
    "make test": "this test suite",
    "make faults": "pytest --list-faults, an option of tests/conftest.py",
    "make lint": "part of make test",
    "make format": "ruff, as in make lint",
    ".venv/bin/pre-commit install": "pre-commit's own",
}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_there_are_examples_and_policies():
    assert RUN_FILES
    assert {short(path) for path in POLICIES} >= {
        "ds_configs/zero3.json",
        "ds_configs/zero3_offload_cpu.json",
    }


@pytest.mark.parametrize("path", RUN_FILES, ids=short)
def test_every_example_validates_with_its_rows(path):
    run = load(path)
    check_rows(run)
    assert resolve_path(run.engine.deepspeed).is_file()
    if run.base.model.startswith("examples/"):
        assert (ROOT / run.base.model / "config.json").is_file()


@pytest.mark.parametrize("path", RUN_FILES, ids=short)
def test_every_example_passes_the_command_lines_own_checks(path, tmp_path):
    preflight.check_run(str(path), [f"output_dir={tmp_path}"])


@pytest.mark.parametrize("path", POLICIES, ids=short)
def test_every_policy_shards_the_parameters(path):
    policy = json.loads(path.read_text(encoding="utf-8"))
    assert policy["zero_optimization"]["stage"] == 3
    # what a run decides is left to the run
    assert policy["train_micro_batch_size_per_gpu"] == "auto"
    assert policy["bf16"]["enabled"] == policy["fp16"]["enabled"] == "auto"
    assert not {"optimizer", "scheduler", "train_batch_size"} & set(policy)


def test_no_other_kind_of_file_hides_in_ds_configs():
    assert {path.suffix for path in (ROOT / "ds_configs").iterdir()} == {".json"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_local_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(
        r'(?:src|href)="([^"]+)"', text
    )
    headings = {_anchor(line) for line in text.splitlines() if line.startswith("#")}
    broken = []
    for target in targets:
        file, _, anchor = unquote(target).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        if (file and not (path.parent / file).exists()) or (not file and anchor not in headings):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_every_command_is_known(path):
    programs = RUN_BY_TESTS if path.name == "README.md" else set()
    unknown = [
        command
        for command in commands(path)
        if command not in COMMANDS and command.split()[0] not in programs
    ]
    assert unknown == [], "add the command to COMMANDS, with what runs it"


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_every_run_file_that_a_command_names_exists(path):
    for command in commands(path):
        named = [word for word in shlex.split(command) if word.startswith("examples/")]
        assert all((ROOT / word).exists() for word in named), command


def commands(path: Path) -> Iterator[str]:
    """Command lines of the shell blocks of a document, continued lines joined, comments cut."""
    blocks = re.findall(
        r"^```(?:sh|bash|shell|console)\n(.*?)^```",
        path.read_text(encoding="utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )
    for block in blocks:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield line.removeprefix("$ ").split(" #")[0].strip()


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower())
    return text.replace(" ", "-")
