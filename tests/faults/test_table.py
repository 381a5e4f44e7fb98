"""The tables of faults, ``*_faults.py``, name tests that exist."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted(path.stem for path in Path(__file__).parent.glob("*_faults.py"))


def rows() -> list[tuple[str, int, tuple[str, ...]]]:
    return [
        (table, number, tests)
        for table in TABLES
        for number, (_, tests) in importlib.import_module(f"tests.faults.{table}").FAULTS.items()
    ]


@pytest.mark.parametrize(("table", "number", "tests"), rows())
def test_the_tests_of_a_fault_exist(table: str, number: int, tests: tuple[str, ...]) -> None:
    assert 1 <= number <= 32
    assert tests
    for test in tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in found, test


def test_every_fault_stands_in_one_table() -> None:
    assert sorted(number for _, number, _ in rows()) == list(range(1, 33))
