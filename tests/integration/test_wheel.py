"""A wheel in a fresh environment, without a clone: ``examples`` and ``init`` write what trains.

The environment sees the libraries of the interpreter that runs the tests, or of another one:

    PROMPTSHARD_TEST_PYTHON=/path/to/python pytest tests/integration/test_wheel.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PROMPTSHARD_TEST_PYTHON", sys.executable)
NOT_SOURCES = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "mlruns", "mlflow.db")
MEGABYTE = 1_000_000

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """A wheel built from a source distribution, and an environment that has it installed."""

    sdist: Path
    wheel: Path
    bin: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    # A build writes into its source folder.
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    alone = ("--no-index", "--no-deps")
    run(*pip, "wheel", *alone, "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")

    run(PYTHON, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    libraries = "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\\n')"
    (packages,) = folder.glob("env/lib/python*/site-packages")
    # Paths in a .pth file are searched after the environment's own packages. The .pth files in them
    # are not read, so an editable installation of the clone is not found.
    (packages / "libraries.pth").write_text(run(PYTHON, "-c", libraries, cwd=folder))
    binaries = folder / "env" / "bin"
    run(*pip, "--python", binaries / "python", "install", *alone, wheel, cwd=folder)
    return Installed(sdist, wheel, binaries)


def test_the_wheel_has_the_packages_and_the_examples_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert {name.split("/")[0] for name in names} == {"launch", "trainer"}
    for package in ("launch", "trainer"):
        files = (p for p in (ROOT / package).rglob("*") if p.is_file() and p.suffix != ".pyc")
        assert names >= {str(path.relative_to(ROOT)) for path in files}
    shipped = {n for n in names if n.startswith("trainer/shipped/")}
    expected = [*(ROOT / "ds_configs").glob("*.json"), *(ROOT / "examples").glob("*.yaml")]
    expected += [
        path
        for part in ("data", "tiny_base", "pharmacy")
        for path in (ROOT / "examples" / part).iterdir()
        if path.is_file()
    ]
    expected += [ROOT / "examples" / "run-file.schema.json"]
    assert shipped == {f"trainer/shipped/{path.relative_to(ROOT)}" for path in expected}
    own = [Path(name).name for name in names - shipped]
    assert not [name for name in own if name.startswith(("test_", "conftest"))]
    assert installed.wheel.stat().st_size < 6 * MEGABYTE


def test_the_source_distribution_has_every_file_of_the_repository(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("benchmarks", "ds_configs", "examples", "launch", "slurm", "tests", "trainer")
    kept = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    kept |= {path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt", ".py")}
    kept |= {ROOT / "Makefile", ROOT / "LICENSE"}
    sources = {str(p.relative_to(ROOT)) for p in kept if "__pycache__" not in p.parts}
    assert sources - names == set()


def test_the_wheel_trains_copied_and_new_run_files_in_another_folder(
    installed: Installed, tmp_path: Path
) -> None:
    python, promptshard = installed.bin / "python", installed.bin / "promptshard"
    place = run(python, "-c", "import trainer; print(trainer.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.bin.parent)

    run(promptshard, "examples", "work", cwd=tmp_path)
    work = tmp_path / "work"
    copied = sorted(path.name for path in work.glob("*.yaml"))
    assert copied == sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
    check = f"from launch import preflight; [preflight.check_run(f, []) for f in {copied}]"
    run(python, "-c", check, cwd=work)
    short = [f"tasks.{task}.max_validation_rows=6" for task in ("triage", "animals")]
    short += ["training.steps=2", "--processes", "1"]
    run(promptshard, "train", "quickstart.yaml", *short, cwd=work)
    summary = json.loads((work / "runs" / "quickstart" / "summary.json").read_text())
    assert {prompt["best_step"] for prompt in summary["prompts"].values()} <= {0, 2}

    run(promptshard, "init", "classify", cwd=tmp_path)
    short = ["tasks.classify.max_validation_rows=6", "training.steps=2", "--processes", "1"]
    run(promptshard, "train", "classify.yaml", *short, cwd=tmp_path)
    assert (tmp_path / "runs" / "classify" / "prompts" / "classify").is_dir()
