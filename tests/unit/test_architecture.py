"""The house rules about imports, held by reading every file's syntax tree and by one stopwatch."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trainer", "launch")
HEAVY = {"torch", "transformers", "deepspeed", "mlflow", "accelerate", "peft", "bitsandbytes"}

#: Who alone may import a library, anywhere in the file.
ONLY_IMPORTER = {"deepspeed": "trainer.distributed.deepspeed_engine", "mlflow": "trainer.tracking"}

#: Modules that a laptop's command line needs: no heavy library, not even through others.
LIGHT = (
    "trainer.checkpointing.checkpoint_names",
    "trainer.checkpointing.run_lock",
    "trainer.config",
    "trainer.data.splits",
    "trainer.distributed.watchdog",
    "trainer.prompts.saved_prompts",
    "trainer.runtime",
    "launch",
)

#: The folders of trainer/ from the lowest to the highest. A module imports from its own folder and
#: from lower ones; imports for type checkers count too.
FOLDERS = (
    "trainer.runtime",
    "trainer.config",
    "trainer.data",
    "trainer.packing",
    "trainer.prompts",
    "trainer.model",
    "trainer.distributed",
    "trainer.evaluation",
    "trainer.inference",
    "trainer.training",
    "trainer.cost_model",
    "trainer.tracking",
    "trainer.checkpointing",
    "trainer.reporting",
    "trainer.run",
    "trainer.api",
    "trainer.commands",
    "trainer.__main__",
)


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    paths = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = modules()


@functools.cache
def syntax_tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@functools.cache
def imports(name: str, *, top_level_only: bool = False) -> tuple[str, ...]:
    """Dotted names that a module imports.

    ``from a import b`` counts as ``a.b`` where that is a module of ours, else as ``a``.
    """
    tree = syntax_tree(name)
    names: list[str] = []
    for node in _walk(tree, top_level_only):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: write absolute imports"
            for alias in node.names:
                full_name = f"{node.module}.{alias.name}"
                names.append(full_name if full_name in MODULES else str(node.module))
    return tuple(names)


def _walk(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if top_level_only:  # what importing the module runs
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
        yield child
        yield from _walk(child, top_level_only)


def reachable(name: str) -> dict[str, str]:
    """All that importing a module loads, each with the module of ours that asks for it."""
    sources: dict[str, str] = {}
    todo = [name]
    while todo:
        module = todo.pop()
        parents = [module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)]
        for wanted in [*imports(module, top_level_only=True), *parents]:
            if wanted not in sources:
                sources[wanted] = module
                if wanted in MODULES:
                    todo.append(wanted)
    return sources


def floor(name: str) -> int:
    """The place of a module's folder in FOLDERS."""
    for level, folder in enumerate(FOLDERS):
        if name == folder or name.startswith(f"{folder}."):
            return level
    raise AssertionError(f"{name} is in no folder of FOLDERS in {Path(__file__).name}")


def test_the_import_graph_covers_the_project():
    assert {"trainer.config", "launch.__main__", "launch.launcher_command"} <= set(MODULES)
    assert "trainer.runtime.errors" in set(imports("launch.__main__"))


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_a_library_has_one_importer(library):
    importers = {name for name in MODULES if any(i.split(".")[0] == library for i in imports(name))}
    owner = ONLY_IMPORTER[library]
    assert {n for n in importers if n != owner and not n.startswith(f"{owner}.")} == set()


@pytest.mark.parametrize(
    "name", [n for n in MODULES if any(f"{n}.".startswith(f"{light}.") for light in LIGHT)]
)
def test_light_modules_load_nothing_heavy(name):
    loads = reachable(name)
    heavy = {wanted: by for wanted, by in loads.items() if wanted.split(".")[0] in HEAVY}
    assert heavy == {}


def test_tracking_and_launch_never_import_torch():
    """The tracker's sidecar process is started beside every run: it must stay small."""
    for name in MODULES:
        if name.startswith(("launch", "trainer.tracking")):
            assert "torch" not in {wanted.split(".")[0] for wanted in imports(name)}, name


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("trainer.")])
def test_imports_go_one_way(name):
    upward = [
        wanted
        for wanted in imports(name)
        if wanted.startswith("trainer.") and floor(wanted) > floor(name)
    ]
    assert upward == []


def test_trainer_does_not_import_launch():
    for name in MODULES:
        if name.split(".")[0] == "trainer":
            assert not any(wanted.split(".")[0] == "launch" for wanted in imports(name)), name


def test_no_import_cycles():
    for name in MODULES:
        seen: set[str] = set()
        todo = [imported for imported in imports(name) if imported in MODULES]
        while todo:
            module = todo.pop()
            assert module != name, f"{name} imports itself through others"
            if module not in seen:
                seen.add(module)
                todo += [i for i in imports(module) if i in MODULES]


def test_the_loop_imports_no_library():
    """DESIGN: the loop is the order of events. It may hold tensors, but calls no library."""
    allowed = set(sys.stdlib_module_names) | {"trainer", "torch"}
    assert {wanted.split(".")[0] for wanted in imports("trainer.training.loop")} <= allowed


def test_help_needs_no_torch():
    """Its seconds are in benchmarks/results/startup.md."""
    code = (
        "import sys, runpy\n"
        "sys.argv = ['promptshard', 'validate', '--help']\n"
        "try:\n    runpy.run_module('launch', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert "RUN.yaml" in done.stdout


def test_names_say_what_they_hold():
    """No variable, argument, attribute or function is called after the act of finding it."""
    vague = {"found", "said", "told", "taken", "whole"}
    uses = []
    for name in MODULES:
        for node in ast.walk(syntax_tree(name)):
            if isinstance(node, ast.Name):
                identifier = node.id
            elif isinstance(node, ast.arg | ast.keyword):
                identifier = node.arg or ""
            elif isinstance(node, ast.Attribute):
                identifier = node.attr
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                identifier = node.name
            else:
                continue
            if identifier.strip("_").lower() in vague:
                uses.append(f"{name}:{node.lineno}: {identifier}")
    assert uses == []


def test_a_rank_imports_neither_trackers_nor_tools_of_reports():
    """Each of these costs every rank time and memory; rank 0 imports some when it needs them."""
    unneeded = {"bitsandbytes", "datasets", "matplotlib", "mlflow", "pandas", "peft", "pyarrow"}
    unneeded |= {"sklearn", "sqlalchemy", "tensorboard"}
    code = (
        "import sys, trainer.__main__, trainer.run\n"
        f"found = {unneeded!r} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
