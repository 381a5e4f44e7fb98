"""How processes started and ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trainer.runtime.process import ending_signal, process_start


@pytest.mark.parametrize(
    ("end", "number"), [("pass", 0), ("raise SystemExit(3)", 0), ("os.kill(os.getpid(), 9)", 9)]
)
def test_exit_status_of_a_process_that_is_not_yet_reaped(end: str, number: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import os; {end}"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ending_signal(child.pid) == number
    assert process_start(child.pid) == ""
    child.wait()
