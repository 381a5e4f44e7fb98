"""The lock of an output folder: one holder, whatever dies or races."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
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
    raise AssertionError(f"nothing was to be said: {text}")


def leave_lock(folder: Path, *, age: float = 0.0, **changed: Any) -> Holder:
    """A lock as another process would have left it."""
    holder = replace(Holder.here(), token="theirs", **changed)
    path = folder / LOCK
    path.write_text(json.dumps(asdict(holder)))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return holder


def owner(folder: Path) -> str:
    token: str = json.loads((folder / LOCK).read_text())["token"]
    return token


def test_one_holds_it_until_it_is_released(tmp_path: Path) -> None:
    held = acquire(tmp_path, quiet)
    with pytest.raises(BadInput) as refused:
        acquire(tmp_path, quiet)
    with pytest.raises(BadInput):
        refuse_if_alive(tmp_path)
    said = str(refused.value)
    for word in (str(os.getpid()), held.holder.host, held.holder.since, "another output_dir"):
        assert word in said
    assert os.listdir(tmp_path) == [LOCK]
    held.release()
    assert os.listdir(tmp_path) == []
    refuse_if_alive(tmp_path)
    acquire(tmp_path, quiet).release()


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from trainer.checkpointing.run_lock import acquire\n"
        "acquire(Path(sys.argv[1]), print); os._exit(9)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: not yet waited for
    refuse_if_alive(tmp_path)
    said: list[str] = []
    acquire(tmp_path, said.append).release()
    child.wait()
    assert f"process {child.pid} on " in said[0]
    assert said[0].endswith("that process is gone")


def test_a_process_with_the_number_of_a_dead_one_is_another(tmp_path: Path) -> None:
    leave_lock(tmp_path, started="1")
    said: list[str] = []
    acquire(tmp_path, said.append).release()
    assert len(said) == 1


@pytest.mark.parametrize("where", [ELSEWHERE, {"namespace": "pid:[1]", "pid": 1}])
def test_elsewhere_the_heartbeat_decides(tmp_path: Path, where: dict[str, Any]) -> None:
    """On another host, or in another container of this one, where its number says nothing."""
    leave_lock(tmp_path, age=run_lock.DEAD_SECONDS - 30, **where)
    with pytest.raises(BadInput, match=rf"in use by process {where['pid']} on "):
        acquire(tmp_path, quiet)
    refuse_if_alive(tmp_path)  # cannot tell
    leave_lock(tmp_path, age=run_lock.DEAD_SECONDS + 30, **where)
    said: list[str] = []
    acquire(tmp_path, said.append).release()
    assert "no sign for 15" in said[0]


@pytest.mark.parametrize(
    ("job", "restarts", "free"), [("7", "1", True), ("7", "0", False), ("8", "1", False)]
)
def test_a_requeued_job_has_its_own_lock_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restarts: str, free: bool
) -> None:
    """Two commands in one allocation are not a requeued job."""
    leave_lock(tmp_path, **ELSEWHERE, job="7", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    said: list[str] = []
    if free:
        acquire(tmp_path, said.append).release()
        assert said[0].endswith("of Slurm job 7: Slurm job 7 was requeued")
    else:
        with pytest.raises(BadInput, match="process 4242 on node-7 of Slurm job 7 since"):
            acquire(tmp_path, said.append)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_one_that_cannot_be_read_is_somebody_s_for_a_while(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(BadInput, match="in use by an unknown process"):
        acquire(tmp_path, quiet)
    os.utime(tmp_path / LOCK, (1e9, 1e9))
    said: list[str] = []
    acquire(tmp_path, said.append).release()
    assert "cannot be read" in said[0]


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path: Path, stale: bool) -> None:
    def contend(_: int) -> run_lock.Lock | None:
        try:
            return acquire(tmp_path, lambda _: None)
        except BadInput:
            return None

    for _ in range(20):
        if stale:
            leave_lock(tmp_path, age=1000, **ELSEWHERE)
        with ThreadPoolExecutor(8) as threads:
            held = [found for found in threads.map(contend, range(8)) if found is not None]
        assert len(held) == 1
        assert owner(tmp_path) == held[0].holder.token
        held[0].release()
        assert os.listdir(tmp_path) == []


def test_who_is_late_leaves_the_lock_of_a_faster_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found a lock dead that another has replaced by its own since, before it could."""
    leave_lock(tmp_path, age=1000, **ELSEWHERE)
    held: list[run_lock.Lock] = []
    why_dead = run_lock._why_dead

    def slow(*arguments: Any) -> str | None:
        why = why_dead(*arguments)
        monkeypatch.setattr(run_lock, "_why_dead", why_dead)
        held.append(acquire(tmp_path, lambda _: None))
        return why

    monkeypatch.setattr(run_lock, "_why_dead", slow)
    with pytest.raises(BadInput, match=f"in use by process {os.getpid()} "):
        acquire(tmp_path, quiet)
    assert owner(tmp_path) == held[0].holder.token
    assert os.listdir(tmp_path) == [LOCK]
    held[0].release()


def test_who_died_while_it_took_over_is_in_nobody_s_way(tmp_path: Path) -> None:
    holder = leave_lock(tmp_path, age=1000, **ELSEWHERE)
    claim = tmp_path / f"{LOCK}.{holder.token}"
    claim.write_text(json.dumps(asdict(replace(Holder.here(), started="1", token="dead"))))
    acquire(tmp_path, lambda _: None).release()
    assert os.listdir(tmp_path) == []


def test_a_beat_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    held = acquire(tmp_path, quiet)
    os.utime(tmp_path / LOCK, (1e9, 1e9))
    while (tmp_path / LOCK).stat().st_mtime < 1.1e9:
        held.check()
    held.release()


def test_one_that_was_deleted_is_taken_again(tmp_path: Path) -> None:
    held = acquire(tmp_path, quiet)
    (tmp_path / LOCK).unlink()
    held.beat()
    held.check()
    assert owner(tmp_path) == held.holder.token
    held.release()


def test_a_process_that_slept_learns_that_it_has_lost(tmp_path: Path) -> None:
    held = acquire(tmp_path, quiet)
    leave_lock(tmp_path, **ELSEWHERE)
    held.beat()
    with pytest.raises(LockLost, match="process 4242 on node-7 has taken this run over"):
        held.check()
    held.release()
    assert owner(tmp_path) == "theirs"


@pytest.mark.parametrize("kind", ["no links", "an answer that was lost"])
def test_file_systems_of_all_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    link = os.link

    def broken(source: Path, target: Path) -> None:
        if kind == "no links":
            raise OSError(errno.EPERM, "no hard links here")
        link(source, target)
        raise FileExistsError(errno.EEXIST, "made it, said it again", str(target))

    monkeypatch.setattr(os, "link", broken)
    held = acquire(tmp_path, quiet)
    monkeypatch.setattr(os, "link", link if kind != "no links" else broken)
    with pytest.raises(BadInput, match="is in use"):
        acquire(tmp_path, quiet)
    assert os.listdir(tmp_path) == [LOCK]
    held.release()


def test_one_that_was_away_for_long_does_not_take_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may have taken the run over, have ended it, and have given the lock back."""
    held = acquire(tmp_path, quiet)
    (tmp_path / LOCK).unlink()
    later = time.time() + run_lock.DEAD_SECONDS + 1
    monkeypatch.setattr(run_lock.time, "time", lambda: later)
    with pytest.raises(run_lock.LockLost, match="gave no sign for too long"):
        held.confirm()
    assert not (tmp_path / LOCK).exists()
    held.release()
