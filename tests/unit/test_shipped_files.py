"""Everything a person may copy works: run files, DeepSpeed policies, links and commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from docs.render import run_file_page
from launch import preflight
from trainer.config import load, resolve_path
from trainer.config.schema import FILE_NAME, schema_text
from trainer.data.splits import check_rows
from trainer.runtime.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
#: Its model and rows are made by the commands of its document, which
#: tests/integration/test_smollm2_example.py runs.
PHARMACY = ROOT / "examples" / "pharmacy" / "pharmacy.yaml"
RUN_FILES = sorted(path for path in (ROOT / "examples").rglob("*.y*ml") if path != PHARMACY)
POLICIES = sorted((ROOT / "ds_configs").rglob("*.json"))
#: Documents whose every command of these programs is run by tests/distributed/test_readme.py.
RUN_DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*RUN_DOCUMENTS, ROOT / "CONTRIBUTING.md"]
RUN_BY_TESTS = {"curl", "promptshard", "deepspeed", "mlflow"}
#: Other commands of a fenced block, and what runs them. A new one fails here until it is added.
COMMANDS = {
    "sbatch slurm/cpu-smoke-test.sbatch": "tests/slurm/test_training.py, on a real Slurm",
    ".venv/bin/python -m benchmarks.memory --write": "tests/unit/test_memory_table.py",
    ".venv/bin/python docs/images/quickstart.py": "the quickstart, as in test_readme.py",
    ".venv/bin/python slurm/render.py": "its function is compared in tests/unit/test_slurm.py",
    ".venv/bin/python -m tests.golden": "the same runs, in tests/distributed",
    "python examples/pharmacy/rows.py work/pharmacy": ("tests/integration/test_smollm2_example.py"),
    "make quickstart": "the same train command, in tests/distributed/test_readme.py",
    "make example-smollm2": "the same command, in tests/integration/test_smollm2_example.py",
    "make test": "this test suite",
    "make test-pythons": "the unit tests, with other interpreters",
    "make test-oldest": "tests marked oldest, with older libraries",
    "make docs": "what it writes is compared in this file",
    "make gpu-check": "with small sizes, in tests/integration/test_small_gpu_check.py",
    "make gpu-wheels": "needs a package index; tests/unit/test_gpu_wheels.py tests its parts",
    "python3 -m pip install --no-index --no-deps --target /tmp/site build/gpu-wheels/*.whl": "pip",
    "PYTHONPATH=/tmp/site python3 -m benchmarks.gpu_check": "as make gpu-check",
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


def test_the_pharmacy_example_lacks_only_its_model_and_rows(tmp_path):
    with pytest.raises(BadInput) as error:
        preflight.check_run(str(PHARMACY), [f"output_dir={tmp_path}"])
    missing = {problem.split(":")[0] for problem in error.value.problems}
    splits = ("train", "validation", "shifted_validation")
    assert missing == {"base.model", *(f"tasks.condition.{split}" for split in splits)}


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


def test_the_reference_of_the_run_file_is_what_the_config_says():
    page = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert page == run_file_page(), "run make docs"
    schema = (ROOT / "examples" / FILE_NAME).read_text(encoding="utf-8")
    assert schema == schema_text(), "run make docs"


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_local_links_lead_somewhere(path):
    text = _text(path)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(
        r'(?:src|href)="([^"]+)"', text
    )
    broken = []
    for target in targets:
        file, _, anchor = unquote(target).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = path.parent / file if file else path
        if not linked.exists() or (anchor and anchor not in _headings(linked)):
            broken.append(target)
    assert broken == []


def test_every_document_is_in_the_map_of_the_readme():
    readme = _text(ROOT / "README.md")
    assert [path.name for path in RUN_DOCUMENTS[1:] if f"](docs/{path.name})" not in readme] == []


def test_the_readme_is_short_and_its_picture_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    assert all(p.stat().st_size < 300_000 for p in (ROOT / "docs" / "images").iterdir())


def _yaml_snippets():
    for path in RUN_DOCUMENTS:
        snippets = re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for number, snippet in enumerate(snippets, start=1):
            yield pytest.param(snippet, id=f"{short(path)}-{number}")


@pytest.mark.parametrize("snippet", list(_yaml_snippets()))
def test_run_files_of_the_documents_are_valid(snippet, tmp_path):
    """The first snippet is a complete run file; each other one replaces sections of it."""
    first = next(_yaml_snippets()).values[0]
    run = yaml.safe_load(first) | yaml.safe_load(snippet)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    # Its data is the reader's own, so the only problems are files that are not there.
    with pytest.raises(BadInput) as error:
        preflight.check_run(str(tmp_path / "run.yaml"), [f"output_dir={tmp_path}"])
    assert all("no such file" in problem for problem in error.value.problems), error.value
    assert {problem.split(":")[0] for problem in error.value.problems} == {
        "tasks.topics.train",
        "tasks.topics.validation",
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_every_command_is_known(path):
    programs = RUN_BY_TESTS if path in RUN_DOCUMENTS else set()
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


def _text(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def _headings(path: Path) -> set[str]:
    return {_anchor(line) for line in _text(path).splitlines() if line.startswith("#")}


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower())
    return text.replace(" ", "-")
