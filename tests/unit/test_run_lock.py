"""The lock of an output folder has one holder, also after crashes and races."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpointing import run_lock
from trainer.checkpointing.run_lock import LOCK, Holder, LockLost, acquire, refuse_if_alive
from trainer.runtime.errors import BadInput

ELSEWHERE = {"host": "node-7", "boot": "another", "pid": 4242}


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def quiet(text: str) -> None:
    raise AssertionError(f"unexpected message: {text}")


def leave_lock(folder: Path, *, age: float = 0.0, **changed: Any) -> Holder:
    """Write a lock as another process would have left it."""
    holder = replace(Holder.here(), token="theirs", **changed)
    path = folder / LOCK
    path.write_text(json.dumps(asdict(holder)))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return holder


def owner(folder: Path) -> str:
    token: str = json.loads((folder / LOCK).read_text())["token"]
    return token


def test_one_process_holds_it_until_release(tmp_path: Path) -> None:
    held = acquire(tmp_path, quiet)
    with pytest.raises(BadInput) as refused:
        acquire(tmp_path, quiet)
    with pytest.raises(BadInput):
        refuse_if_alive(tmp_path)
    message = str(refused.value)
    for word in (str(os.getpid()), held.holder.host, held.holder.since, "another output_dir"):
        assert word in message
    assert os.listdir(tmp_path) == [LOCK]
    held.release()
    assert os.listdir(tmp_path) == []
    refuse_if_alive(tmp_path)
    acquire(tmp_path, quiet).release()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from trainer.checkpointing.run_lock import acquire\n"
        "acquire(Path(sys.argv[1]), print); os._exit(9)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: not yet waited for
    refuse_if_alive(tmp_path)
    messages: list[str] = []
    acquire(tmp_path, messages.append).release()
    child.wait()
    assert f"process {child.pid} on " in messages[0]
    assert messages[0].endswith("that process is gone")


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    leave_lock(tmp_path, started="1")
    messages: list[str] = []
    acquire(tmp_path, messages.append).release()
    assert len(messages) == 1


@pytest.mark.parametrize("where", [ELSEWHERE, {"namespace": "pid:[1]", "pid": 1}])
def test_on_another_host_the_heartbeat_decides(tmp_path: Path, where: dict[str, Any]) -> None:
    """On another host or in another container, where the PID cannot be looked up."""
    leave_lock(tmp_path, age=run_lock.DEAD_SECONDS - 30, **where)
    with pytest.raises(BadInput, match=rf"in use by process {where['pid']} on "):
        acquire(tmp_path, quiet)
    refuse_if_alive(tmp_path)  # the age is not known here
    leave_lock(tmp_path, age=run_lock.DEAD_SECONDS + 30, **where)
    messages: list[str] = []
    acquire(tmp_path, messages.append).release()
    assert "no heartbeat for 15" in messages[0]


@pytest.mark.fault("two jobs on one output folder")
@pytest.mark.parametrize(("restarts", "free"), [("1", True), ("0", False)])
def test_a_requeued_job_takes_its_own_lock_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, free: bool
) -> None:
    """Two commands in one allocation are not a requeued job."""
    leave_lock(tmp_path, **ELSEWHERE, job="7", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    messages: list[str] = []
    if free:
        acquire(tmp_path, messages.append).release()
        assert messages[0].endswith("of Slurm job 7: Slurm job 7 was requeued")
    else:
        with pytest.raises(BadInput, match="process 4242 on node-7 of Slurm job 7 since"):
            acquire(tmp_path, messages.append)


@pytest.mark.parametrize("alive", [True, False])
def test_a_job_waits_until_another_one_is_certainly_dead_or_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    """It may start seconds after the other one was killed: --dependency afterany."""
    leave_lock(tmp_path, **ELSEWHERE, job="7")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            now = time.time() if alive else time.time() - run_lock.DEAD_SECONDS - 1
            os.utime(tmp_path / LOCK, (now, now))

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    messages: list[str] = []
    if alive:
        with pytest.raises(BadInput, match="process 4242 on node-7 of Slurm job 7 since"):
            acquire(tmp_path, messages.append)
    else:
        acquire(tmp_path, messages.append).release()
        assert "no heartbeat for 12" in messages[1]
    assert len(waited) == 3
    assert "waiting for its next heartbeat" in messages[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_a_damaged_lock_counts_until_it_is_old(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(BadInput, match="in use by an unknown process"):
        acquire(tmp_path, quiet)
    os.utime(tmp_path / LOCK, (1e9, 1e9))
    messages: list[str] = []
    acquire(tmp_path, messages.append).release()
    assert "is damaged" in messages[0]


@pytest.mark.fault("two jobs on one output folder")
@pytest.mark.parametrize("stale", [False, True])
def test_one_of_many_contenders_gets_it(
    tmp_path: Path, stale: bool, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # threads interleave at every step

    def contend(_: int) -> run_lock.Lock | None:
        try:
            return acquire(tmp_path, lambda _: None)
        except BadInput:
            return None

    for _ in range(20):
        if stale:
            leave_lock(tmp_path, age=1000, **ELSEWHERE)
        with ThreadPoolExecutor(8) as threads:
            held = [lock for lock in threads.map(contend, range(8)) if lock is not None]
        assert len(held) == 1
        assert owner(tmp_path) == held[0].holder.token
        held[0].release()
        assert os.listdir(tmp_path) == []


def test_a_late_process_does_not_replace_the_lock_of_a_faster_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read a stale lock, which another process takes over before it can."""
    leave_lock(tmp_path, age=1000, **ELSEWHERE)
    held: list[run_lock.Lock] = []
    read = run_lock._read

    def slow(path: Path) -> Any:
        stale = read(path)
        monkeypatch.setattr(run_lock, "_read", read)
        held.append(acquire(tmp_path, lambda _: None))
        return stale

    monkeypatch.setattr(run_lock, "_read", slow)
    with pytest.raises(BadInput, match=f"in use by process {os.getpid()} "):
        acquire(tmp_path, quiet)
    assert owner(tmp_path) == held[0].holder.token
    assert os.listdir(tmp_path) == [LOCK]
    held[0].release()


def test_a_process_that_died_during_a_takeover_blocks_nothing(tmp_path: Path) -> None:
    leave_lock(tmp_path, age=1000, **ELSEWHERE)
    content = (tmp_path / LOCK).read_bytes()
    claim = tmp_path / f"{LOCK}.{hashlib.sha256(content).hexdigest()[:32]}"
    claim.write_text(json.dumps(asdict(replace(Holder.here(), started="1", token="dead"))))
    acquire(tmp_path, lambda _: None).release()
    assert os.listdir(tmp_path) == []


def test_a_heartbeat_touches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    held = acquire(tmp_path, quiet)
    os.utime(tmp_path / LOCK, (1e9, 1e9))
    while (tmp_path / LOCK).stat().st_mtime < 1.1e9:
        held.check()
    held.release()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), BadInput("not readable")])
def test_heartbeats_continue_when_the_file_was_not_readable_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """For example because a Kerberos ticket had to be renewed."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    held = acquire(tmp_path, quiet)
    read, failed = run_lock._read, threading.Event()

    def unreadable(path: Path) -> object:
        failed.set()
        raise error

    monkeypatch.setattr(run_lock, "_read", unreadable)
    assert failed.wait(10)
    monkeypatch.setattr(run_lock, "_read", read)
    os.utime(tmp_path / LOCK, (1e9, 1e9))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime < 1.1e9:
        assert time.monotonic() < deadline, "no heartbeat"
        time.sleep(0.01)
    held.release()


def test_a_deleted_lock_is_created_again(tmp_path: Path) -> None:
    held = acquire(tmp_path, quiet)
    (tmp_path / LOCK).unlink()
    held.beat()
    held.check()
    assert owner(tmp_path) == held.holder.token
    held.release()


def test_a_suspended_process_notices_the_takeover(tmp_path: Path) -> None:
    held = acquire(tmp_path, quiet)
    leave_lock(tmp_path, **ELSEWHERE)
    held.beat()
    with pytest.raises(LockLost, match="process 4242 on node-7 has taken this run over"):
        held.check()
    held.release()
    assert owner(tmp_path) == "theirs"


def test_a_deleted_lock_is_not_created_again_after_a_long_suspension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have taken the run over, ended it, and released the lock."""
    held = acquire(tmp_path, quiet)
    (tmp_path / LOCK).unlink()
    later = time.time() + run_lock.DEAD_SECONDS + 1
    monkeypatch.setattr(run_lock.time, "time", lambda: later)
    with pytest.raises(run_lock.LockLost, match="sent no heartbeat for too long"):
        held.confirm()
    assert not (tmp_path / LOCK).exists()
    held.release()
