"""A checkpoint is complete or absent after a crash, a full disk or damage."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.run_folder import save_checkpoint
from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import intact, newest
from trainer.runtime.errors import BadInput

TENSORS = {
    "p/encoder/embedding": torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),
    "p/optimizer/embedding/step": torch.tensor(3.0),
    "p/half": torch.ones(3, dtype=torch.bfloat16),
}
STATE: dict[str, Any] = {"loss": 0.1 + 0.2, "cursor": {"epoch": 1}, "nothing": None}


def write(folder: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        save_checkpoint(folder, step, TENSORS, {**STATE, "at": step}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    path = save_checkpoint(folder, 300, TENSORS, STATE, keep=3)
    assert path == folder / "step-00000300"
    assert names(path) == ["manifest.json", "state.json", "state.safetensors"]
    saved = newest(folder)
    assert saved is not None
    assert (saved.step, saved.path, saved.state) == (300, path, STATE)
    assert saved.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert saved.tensors[name].dtype == tensor.dtype
        assert torch.equal(saved.tensors[name], tensor)


def test_intact_skips_damaged_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    assert [saved.step for saved in intact(tmp_path)] == [1, 3]
    assert "step-00000002: state.json: has 2 bytes" in caplog.text
    assert intact(tmp_path / "missing") == []


def test_tensors_that_safetensors_would_refuse(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    save_checkpoint(tmp_path, 1, {"transposed": weight.T, "empty": torch.zeros(0, 4)}, {}, keep=1)
    saved = newest(tmp_path)
    assert saved is not None
    assert torch.equal(saved.tensors["transposed"], weight.detach().T)


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert newest(tmp_path) is None


def test_keeps_the_newest(tmp_path: Path) -> None:
    write(tmp_path, 50, 100, 150, 200, keep=2)
    assert names(tmp_path) == ["step-00000150", "step-00000200"]
    write(tmp_path, 123_456_789, keep=1)
    assert names(tmp_path) == ["step-123456789"]
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 123_456_789


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def garble(path: Path) -> None:
    path.write_bytes(b"\xff garbage {")


def remove(path: Path) -> None:
    path.unlink()


FILES = ["state.safetensors", "state.json", "manifest.json"]
DAMAGE = [truncate, flip_a_bit, garble, remove]


@pytest.mark.fault("newest checkpoint is truncated")
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoints_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Any
) -> None:
    write(tmp_path, 100, 200)
    damage(tmp_path / "step-00000200" / file)
    with caplog.at_level(logging.WARNING):
        saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 100
    assert saved.state["at"] == 100
    assert "step-00000200" in caplog.text
    assert file in caplog.text


@pytest.mark.fault("bit flipped in a checkpoint")
def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    """safetensors accepts a flipped bit in a tensor; the manifest does not."""
    write(tmp_path, 100, 200)
    for file in FILES[:2]:
        path = tmp_path / "step-00000200" / file
        content = path.read_bytes()
        for position in range(0, len(content), 13):
            broken = bytearray(content)
            broken[position] ^= 1 << (position % 8)
            path.write_bytes(broken)
            saved = newest(tmp_path)
            assert saved is not None, (file, position)
            assert saved.step == 100, (file, position)
        path.write_bytes(content)


@pytest.mark.fault("pointer to the newest checkpoint is missing or garbled")
@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {"format": 99},
        {"format": 1, "step": 7},
        {"format": 1, "step": 100},
        {"format": 1, "step": 100, "files": []},
        {"format": 1, "step": 100, "files": {"state.json": {}}},
    ],
)
def test_no_silent_start_over(tmp_path: Path, manifest: Any) -> None:
    write(tmp_path, 100)
    (tmp_path / "step-00000100" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=r"manifest\.json(.|\n)*no checkpoint is usable"):
        newest(tmp_path)


def test_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 100)
    (tmp_path / "step-00000100").rename(tmp_path / "step-00000900")
    with pytest.raises(BadInput, match="step is 100"):
        newest(tmp_path)


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.fault("checkpoint is a pickle with a payload")
def test_pickle_is_refused_and_never_runs(tmp_path: Path, monkeypatch: Any) -> None:
    """Also if its checksums match."""
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "payload"))
    write(tmp_path / "c", 100)
    path = tmp_path / "c" / "step-00000100"
    content = pickle.dumps(Payload())
    (path / "state.safetensors").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.safetensors"] = {
        "bytes": len(content),
        "sha256": sha256(content).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="not a safetensors file"):
        newest(tmp_path / "c")
    assert not (tmp_path / "payload").exists()
    source = Path(checkpoint.__file__).read_text()
    assert "import pickle" not in source
    assert "torch.load" not in source


@pytest.mark.fault("process killed while writing a checkpoint")
def test_files_left_by_a_crash_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, 100)
    for prefix in (checkpoint.WRITING, checkpoint.DELETING):
        shutil.copytree(tmp_path / "step-00000100", tmp_path / f"{prefix}step-00000200")
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 100
    write(tmp_path, 300)
    assert names(tmp_path) == ["step-00000100", "step-00000300"]


def test_an_interrupted_first_write_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / f"{checkpoint.WRITING}step-00000050").mkdir()
    assert newest(tmp_path) is None


def test_an_archived_checkpoint_counts(tmp_path: Path) -> None:
    write(tmp_path, 100)
    (tmp_path / "step-00000100").rename(tmp_path / f"{checkpoint.REPLACED}step-00000100")
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 100
    write(tmp_path, 100)
    assert names(tmp_path) == ["step-00000100"]


def save_and_die(folder: Path, step: int, keep: int, operation: int) -> bool:
    """Write in a child that exits before its n-th file operation; False: it has finished."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                seen += 1
                if seen > operation:
                    os._exit(9)

        try:
            sys.addaudithook(hook)
            save_checkpoint(folder, step, TENSORS, {**STATE, "at": "new"}, keep)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.fault("process killed while writing a checkpoint")
@pytest.mark.parametrize("step", [100, 200])
def test_killed_at_every_stage(tmp_path: Path, step: int) -> None:
    """A new step, and the same step again: the old checkpoint or the new one is intact."""
    outcomes = []
    for operation in range(200):
        folder = tmp_path / str(operation)
        write(folder, 50, 100)
        died = save_and_die(folder, step, 1, operation)
        saved = newest(folder)
        assert saved is not None
        assert saved.state["at"] in (100, "new")
        assert saved.step == (step if saved.state["at"] == "new" else 100)
        outcomes.append(saved.state["at"])
        write(folder, 300, keep=1)
        assert names(folder) == ["step-00000300"], "leftovers stay for ever"
        shutil.rmtree(folder)
        if not died:
            break
    assert len(outcomes) > 10
    assert not died
    assert outcomes[0] == 100
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=lambda at: at == "new"), "once there, it stays"


@pytest.mark.fault("disk full")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000100"]
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 100


def test_later_damaged_checkpoints_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With keep=1, a damaged later checkpoint must not replace the intact one."""
    write(tmp_path, 100, 300)
    truncate(tmp_path / "step-00000300" / "state.json")
    assert newest(tmp_path) is not None
    write(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["step-00000200"]
    assert "later step deleted" in caplog.text


def test_a_transient_read_error_skips_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permanent failure ends the run, because the unreadable checkpoint may be intact."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.ones(1)}, {}, keep=2)
    read, failing = checkpoint._read, [True]

    def stale(path: Path) -> Any:
        if failing and path.name.endswith("2"):
            if len(failing) == 1:
                failing.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(checkpoint, "_read", stale)
    monkeypatch.setattr(checkpoint, "READ_PAUSE_SECONDS", 0)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.step == 2
    failing.extend([True, True])
    with pytest.raises(BadInput, match="step-00000002: cannot be read: Stale file handle"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("name", ["step-00000009", ".replaced-step-00000009", ".deleting-x"])
def test_a_symlink_loop_is_skipped_and_removed(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    (tmp_path / name).symlink_to(tmp_path / name)
    messages: list[str] = []
    saved = newest(tmp_path, messages.append)
    assert saved is not None
    assert saved.step == 1
    write(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_symlink_with_the_checkpoints_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").symlink_to(tmp_path / "step-00000002")
    write(tmp_path, 2)
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 2
    assert names(tmp_path) == ["step-00000002"]
