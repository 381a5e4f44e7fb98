"""How processes started and ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import PROJECT_ROOT
from trainer.runtime import process
from trainer.runtime.process import ending_signal, process_start

PROGRAMS = sorted(
    path.relative_to(PROJECT_ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in (PROJECT_ROOT / "trainer").rglob("*.py")
    if "fast_imports():" in path.read_text() and path.name != "process.py"
)


@pytest.mark.parametrize(
    ("end", "number"), [("pass", 0), ("raise SystemExit(3)", 0), ("os.kill(os.getpid(), 9)", 9)]
)
def test_exit_status_of_a_process_that_is_not_yet_reaped(end: str, number: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import os; {end}"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ending_signal(child.pid) == number
    assert process_start(child.pid) == ""
    child.wait()


def test_the_start_of_the_command_counts_if_it_is_known(monkeypatch):
    monkeypatch.setattr(process.time, "time", lambda: 1000.0)
    monkeypatch.setenv(process.STARTED, "940.5")
    assert process.seconds_since_start() == 59.5
    for value in ("", "no number"):
        monkeypatch.setenv(process.STARTED, value)
        assert process.seconds_since_start() == pytest.approx(process.process_age(), abs=5)
    monkeypatch.delenv(process.STARTED)
    assert process.seconds_since_start() > 0


@pytest.mark.parametrize("module", PROGRAMS)
def test_programs_import_transformers_only_where_libraries_are_hidden(module: str) -> None:
    """If it has found accelerate before, it imports accelerate, and fails."""
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_kernels_of_the_hub_are_not_imported(tmp_path: Path) -> None:
    """With them, functions of transformers become modules."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('imported')")
    metadata = tmp_path / "kernels-0.18.5.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    code = (
        "from trainer.runtime.process import fast_imports\n"
        "with fast_imports():\n"
        "    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb\n"
        "print(apply_rotary_pos_emb.__name__)"
    )
    path = os.pathsep.join([str(tmp_path), str(PROJECT_ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "apply_rotary_pos_emb", done.stderr[-1000:]
