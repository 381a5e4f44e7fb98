"""Checkpoints in the background: queueing, replacement, and reports of failures."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpointing import checkpoint
from trainer.checkpointing.async_writer import AsyncCheckpointWriter
from trainer.checkpointing.checkpoint import Snapshot, newest, take_snapshot
from trainer.checkpointing.run_lock import LockLost

GO = 20.0


def at(step: int) -> Callable[[], Snapshot]:
    return lambda: take_snapshot(step, {"x": torch.full((3,), float(step))}, {"at": step})


class Disk:
    """A disk that writes on request, or is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.full = threading.Event(), threading.Event(), False
        self.steps: list[int] = []
        write = checkpoint.write

        def slow(folder: Path, snapshot_: Snapshot, *rest: Any) -> Path:
            self.begun.set()
            assert self.go.wait(GO)
            self.steps.append(snapshot_.step)
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(folder, snapshot_, *rest)

        monkeypatch.setattr(checkpoint, "write", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_slow_disk_skips_checkpoints_without_delaying_steps(tmp_path: Path, disk: Disk) -> None:
    with AsyncCheckpointWriter(tmp_path, 5, print) as saves:
        for step in (1, 2, 3, 4):
            saves.save(at(step))
            assert disk.begun.wait(GO)
        assert saves.newest is None, "none of these calls waited for the disk"
        disk.go.set()
    assert disk.steps == [1, 4]
    assert saves.newest == tmp_path / "step-00000004"
    report = saves.report(100.0)
    assert (report["written"], report["replaced_by_newer"], report["failed"]) == (2, 2, {})
    assert report["share_of_step_time"] == pytest.approx(report["held_up_seconds"] / 100)
    saves.save(at(5))  # the thread has ended; another one writes
    saves.wait()
    assert disk.steps == [1, 4, 5]


def test_a_snapshot_does_not_change_later(tmp_path: Path, disk: Disk) -> None:
    state = {"progress": {"step": 1}}
    with AsyncCheckpointWriter(tmp_path, 1, print) as saves:
        saves.save(lambda: take_snapshot(1, {}, state))
        state["progress"]["step"] = 2
        disk.go.set()
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.state == {"progress": {"step": 1}}


def test_a_failure_is_reported_at_the_next_step_and_in_the_summary(
    tmp_path: Path, disk: Disk
) -> None:
    messages: list[str] = []
    disk.go.set()
    saves = AsyncCheckpointWriter(tmp_path, 2, messages.append)
    saves.save(at(1))
    saves.wait()
    disk.full = True
    saves.save(at(2))
    saves.wait()
    assert messages == [
        "step 2: no checkpoint written: [Errno 28] No space left on device; training continues"
    ]
    saves.report_problems()
    assert len(messages) == 1, "reported once"
    disk.full = False
    saves.save(at(3))
    saves.wait()
    assert saves.report(1.0)["failed"] == {"2": "[Errno 28] No space left on device"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_stop_and_failure_wait_for_the_pending_write(
    tmp_path: Path, disk: Disk, end: type[BaseException]
) -> None:
    def run() -> None:
        with AsyncCheckpointWriter(tmp_path, 1, print) as saves:
            saves.save(at(1))
            threading.Timer(0.1, disk.go.set).start()
            raise end

    with pytest.raises(end):
        run()
    assert newest(tmp_path) is not None


def test_a_second_signal_does_not_abort_the_write(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both arrive during the wait, wherever a busy machine would deliver them to the test."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    saves = AsyncCheckpointWriter(tmp_path, 1, print)
    saves.save(at(1))
    write = saves._newest_write
    assert write is not None
    result, signals = write.result, [signal.SIGINT, signal.SIGINT]

    def interrupted_twice() -> None:
        if signals:
            signal.raise_signal(signals.pop())
        disk.go.set()
        result()

    monkeypatch.setattr(write, "result", interrupted_twice)
    try:
        with pytest.raises(KeyboardInterrupt):
            saves.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not signals
    assert newest(tmp_path) is not None


def test_nothing_is_written_after_the_lock_is_lost(tmp_path: Path) -> None:
    def check() -> None:
        raise LockLost("node-7 has snapshot_ this run over")

    messages: list[str] = []
    with AsyncCheckpointWriter(tmp_path, 1, messages.append, check) as saves:
        saves.save(at(1))
    assert newest(tmp_path) is None
    assert "node-7 has snapshot_ this run over" in messages[0]
