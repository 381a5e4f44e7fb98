"""The code imports exactly the dependencies of pyproject.toml; optional packages may be missing."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config.data_source import DataSource
from trainer.data.table_readers import open_hub
from trainer.runtime.errors import BadInput
from trainer.tracking.pusher import where_to_look
from trainer.tracking.store_uri import StoreAddress

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Import names that differ from the package's name.
IMPORTED_AS = {
    "huggingface-hub": "huggingface_hub",
    "mlflow-skinny": "mlflow",
    "pyyaml": "yaml",
    "rouge-score": "rouge_score",
}
#: Imported by mlflow-skinny, which does not require them, for SQLite stores.
FOR_MLFLOW = {"alembic", "sqlalchemy"}
#: Scripts that an export copies for users, who run them with the packages of other programs.
CLIENTS = ROOT / "trainer" / "prompts" / "formats" / "clients"
#: Extras for work on the repository; the other extras are for users.
DEVELOPMENT = {"test", "benchmark", "dev"}


def names(requirements: list[str]) -> set[str]:
    found = {re.split(r"[^\w-]", requirement, maxsplit=1)[0] for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in found}


def imports() -> set[str]:
    """Top-level names that the code imports, without Python's own and the project's."""
    found = set()
    for folder in ("trainer", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent == CLIENTS:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"trainer", "launch"}


def test_every_dependency_is_imported_and_every_import_is_a_dependency() -> None:
    required = names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"].items()
    optional = [names(group) for extra, group in extras if extra not in DEVELOPMENT]
    found = imports()
    assert required - found <= FOR_MLFLOW
    assert found - required <= set().union(*optional)


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    wanted = {
        re.split(r"[^\w-]", text, maxsplit=1)[0].lower().replace("_", "-")
        for group in groups
        for text in group
    }
    assert wanted - pins == {"promptshard"}


def test_hub_data_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"hf://glue/sst2: .*pip install 'promptshard\[hub\]'"):
        open_hub(DataSource(hub="glue", name="sst2"), "train")


def test_address_of_the_curves_without_mlflow_ui(monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreAddress("sqlite:////x/mlflow.db", "sqlite:////x/mlflow.db")
    assert "promptshard[ui]" not in where_to_look(store, "#/1")

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib, "metadata", SimpleNamespace(**vars(importlib.metadata)))
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    command, page, hint = where_to_look(store, "#/1").splitlines()
    assert command == "mlflow ui --backend-store-uri sqlite:////x/mlflow.db"
    assert page == "then open http://127.0.0.1:5000/#/1"
    assert hint.endswith("pip install 'promptshard[ui]'")
