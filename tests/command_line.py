"""Run commands of ``promptshard`` in the process of the tests.

Starting Python and importing takes longer than most commands. In tests/unit/test_launch.py,
``test_a_process_ends_as_its_command_does`` compares this with real processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from launch import __main__ as command_line
from launch import messages

ROOT = Path(__file__).resolve().parents[1]


def promptshard(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's folder; return its exit code and output."""
    words, stdout, stderr = [str(word) for word in arguments], io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.callback(sys.path.__setitem__, slice(None), [*sys.path])
        stack.enter_context(chdir(ROOT))
        stack.enter_context(patch.dict(os.environ, COLUMNS="100"))
        stack.enter_context(patch.object(sys, "argv", ["promptshard", *words]))
        stack.enter_context(patch("trainer.runtime.stdio.keep_streams"))
        stack.enter_context(patch("launch.commands.run_alone", _run_here))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        ended = stack.enter_context(pytest.raises(SystemExit))
        command_line._run()
    code = int(ended.value.code or 0)
    return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())


def _run_here(module: str, arguments: Sequence[str], *_: Any, imports: str = "") -> int:
    """``run_alone`` without a process."""
    messages.note(f"importing {imports or 'torch and transformers'}")
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    program = f"{module}.__main__" if spec.submodule_search_locations else module
    code: int = importlib.import_module(program).main(arguments)
    return code
