"""Message and exit code of a rank that a signal stops: only training can be resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_launch import RUN

ROOT = Path(__file__).resolve().parents[2]
#: The program of a rank, with a signal in place of its work.
RANK = """
import ctypes, os, signal, sys, threading, time, types
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
def blocked():
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # waits in C code, as torch for other ranks
def stop(*args, **kwargs):
    if "training" in sys.argv[4:]:
        from trainer.runtime import stop_signals
        stop_signals.defer()
        if "failing" in sys.argv[4:]:
            stop_signals.write_stop_file(Path(sys.argv[2], "out", "logs"))
            raise RuntimeError("loss is lost")
        raise stop_signals.Stopped
    if sys.argv[4:] == ["blocked"]:
        threading.Timer(0.5, os.kill, (os.getpid(), getattr(signal, sys.argv[3]))).start()
        blocked()
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        signal.pause()
    except KeyboardInterrupt:
        if sys.argv[4:] == ["replaced"]:
            raise ModuleNotFoundError("Could not import module") from None
        if sys.argv[4:] == ["lost"]:
            blocked()
        raise
if sys.argv[1] == "train":
    sys.modules["trainer.run"] = types.SimpleNamespace(train=stop)
    import trainer.__main__
    from trainer.__main__ import main
    if sys.argv[4:] == ["slow"]:
        from trainer.runtime import stop_signals
        stop_signals.BLOCKED_SECONDS, stop_signals.LOST_SECONDS = 0.1, 0.2
        def slow(output):
            with open(sys.argv[2] + "/asked", "a") as file:
                file.write("once ")
            time.sleep(1)
        trainer.__main__.newest_checkpoint = slow
    sys.exit(main([sys.argv[2] + "/run.yaml", *(a for a in sys.argv[4:] if a == "--fresh")]))
from trainer.commands import generate
generate._generate = stop
sys.exit(generate.main([sys.argv[2] + "/out", "--prompt=triage", "--input=words"]))
"""


RESUMED = "Stopped. Rerun the command to resume from step-00000007."
RESTARTED = "Stopped before the first checkpoint. Rerun the command to start over."


@pytest.mark.parametrize(
    ("command", "checkpoints", "signal_name", "code", "words"),
    [
        ("train", ["step-00000007"], "SIGINT", 75, RESUMED),
        ("train", ["step-00000007"], "SIGTERM", 75, RESUMED),
        ("train", ["step-00000007"], "SIGUSR1", 75, RESUMED),
        ("train", [], "SIGTERM", 75, RESTARTED),
        ("generate", ["step-00000007"], "SIGINT", 1, "Stopped."),
        ("generate", ["step-00000007"], "SIGUSR1", 1, "Stopped."),
    ],
)
def test_only_training_reports_that_it_can_be_resumed(
    tmp_path, command, checkpoints, signal_name, code, words
):
    for name in checkpoints:
        (tmp_path / "out" / "checkpoints" / name).mkdir(parents=True)
    done = stopped_rank(tmp_path, command, signal_name)
    assert done.returncode == code, done.stderr
    assert done.stderr == f"{words}\n"


def test_a_command_that_started_over_is_resumed_without_the_option(tmp_path: Path) -> None:
    """Rerun as it was, it would archive the run that it has just stopped."""
    (tmp_path / "out" / "checkpoints" / "step-00000007").mkdir(parents=True)
    done = stopped_rank(tmp_path, "train", "SIGTERM", "--fresh", "training")
    assert done.stderr == f"{RESUMED.replace('command', 'command without --fresh')}\n"
    done = stopped_rank(tmp_path, "train", "SIGTERM", "--fresh")
    assert done.stderr == f"{RESTARTED}\n", "the checkpoint is of the earlier run"


def test_a_failure_is_reported_although_another_start_in_the_folder_was_stopped(
    tmp_path: Path,
) -> None:
    """A run that trains stops on all ranks together: none fails because another one stopped."""
    done = stopped_rank(tmp_path, "train", "SIGTERM", "training", "failing")
    assert done.returncode == 1, done.stderr
    assert "loss is lost" in done.stderr


def test_a_library_may_turn_the_signal_into_another_error(tmp_path: Path) -> None:
    """An import that a signal ends can fail with an error of its own."""
    done = stopped_rank(tmp_path, "train", "SIGTERM", "replaced")
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith("Stopped before the first checkpoint. Rerun the command")


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_rank_that_waits_in_c_code(tmp_path: Path, signal_name: str) -> None:
    """Other ranks may never connect."""
    done = stopped_rank(tmp_path, "train", signal_name, "blocked")
    assert done.returncode == 75, done.stderr
    assert done.stderr == f"{RESTARTED}\n"
    assert (tmp_path / "out" / "logs" / "stopped.txt").exists()


def test_a_lost_interrupt_ends_a_rank_that_waits_in_c_code(tmp_path: Path) -> None:
    """Python and libraries can ignore ``KeyboardInterrupt``; the rank then waits for others."""
    done = stopped_rank(tmp_path, "train", "SIGTERM", "lost")
    assert done.returncode == 75, done.stderr
    assert done.stderr == f"{RESTARTED}\n"


def test_a_rank_that_is_ending_is_not_ended_a_second_time(tmp_path: Path) -> None:
    done = stopped_rank(tmp_path, "train", "SIGTERM", "slow")
    assert (done.returncode, done.stderr) == (75, f"{RESTARTED}\n")
    assert (tmp_path / "asked").read_text() == "once "


def stopped_rank(
    tmp_path: Path, command: str, signal_name: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run a rank of a run in ``tmp_path`` that a signal stops."""
    run = RUN.format(folder=tmp_path)
    (tmp_path / "run.yaml").write_text(run)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "run.yaml").write_text(run)
    return subprocess.run(
        [sys.executable, "-c", RANK, command, str(tmp_path), signal_name, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
