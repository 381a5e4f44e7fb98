"""Rank 0 writes to the user's stdout; other output goes to the rank's log."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import os, sys
from pathlib import Path
from trainer.runtime.stdio import claim
out, err = claim(int(sys.argv[1]), Path(sys.argv[2]))
print("output of Python")
os.system("echo output of a child; echo more >&2")
out.write(f"own words, tty {out.isatty()}\\n")
err.write("own error\\n")
assert os.read(0, 1) == b""
"""


def start(rank: int, log: Path, **streams) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RANK, str(rank), str(log)],
        cwd=ROOT,
        text=True,
        timeout=30,
        check=True,
        **streams,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_launcher_stdout_is_unchanged(tmp_path, rank):
    log = tmp_path / "logs" / "rank.log"
    done = start(rank, log, capture_output=True)
    assert done.stdout == ("own words, tty False\n" if rank == 0 else "")
    assert done.stderr == ("own error\n" if rank == 0 else "")
    lines = sorted(log.read_text().splitlines())
    assert lines == ["more", "output of Python", "output of a child"]


def test_under_the_launcher_descriptor_0_is_the_terminal(tmp_path):
    master, terminal = pty.openpty()
    with (tmp_path / "launcher.log").open("wb") as launcher:
        start(
            0,
            tmp_path / "rank.log",
            stdin=terminal,
            stdout=launcher,
            stderr=subprocess.PIPE,
            env={**os.environ, "PROMPTSHARD_STDOUT_FD": "0"},
        )
    os.close(terminal)
    assert os.read(master, 1000) == b"own words, tty True\r\n"
    os.close(master)
    assert (tmp_path / "launcher.log").read_text() == ""


def test_a_resumed_run_appends_to_its_log(tmp_path):
    log = tmp_path / "rank.log"
    for _ in range(2):
        start(0, log, capture_output=True)
    assert log.read_text().count("output of Python") == 2


def unwritable(where: str) -> int:
    """Open a pipe whose reader has exited, or a device that is full."""
    if where != "pipe":
        return os.open(where, os.O_WRONLY)
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("where", ["pipe", "/dev/full"])
def test_a_closed_reader_or_a_full_disk_stops_nothing(tmp_path, where):
    """Ctrl-C also ends a ``tee`` that reads the output, while the run still has to be saved."""
    out = unwritable(where)
    program = (
        "import sys; from pathlib import Path; from trainer.runtime.console import Console\n"
        "from trainer.runtime.stdio import claim\n"
        "out, err = claim(0, Path(sys.argv[1]))\n"
        "console = Console(out, err)\n"
        "for _ in range(3): console.print('x' * 5000)\n"
        "print('continued', flush=True)"
    )
    log = tmp_path / "rank.log"
    command = [sys.executable, "-c", program, str(log)]
    done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, timeout=60)
    os.close(out)
    assert done.returncode == 0, done.stderr
    assert "continued" in log.read_text()


@pytest.mark.parametrize(("where", "code"), [("pipe", 0), ("/dev/full", 1)])
def test_an_answer_that_is_lost_on_a_full_disk_is_an_error(tmp_path, where, code):
    out = unwritable(where)
    program = (
        "import sys; from pathlib import Path\n"
        "from trainer.runtime.rank_program import run_guarded\n"
        "answer = lambda console: console.answer('yes')\n"
        "sys.exit(run_guarded(0, Path(sys.argv[1]), answer, answers=True))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(out)
    assert done.returncode == code
    error = "error: stdout: the result is not written: No space left on device\n"
    assert done.stderr == (error if code else "")
