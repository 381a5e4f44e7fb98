"""Files are replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.runtime import atomic_io


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    atomic_io.write(path, "old")
    with atomic_io.replacing(path) as file:
        file.write(b"new, ")
        file.flush()
        assert path.read_text() == "old"
        file.write("ünd whole".encode())
    assert path.read_text(encoding="utf-8") == "new, ünd whole"
    assert list(tmp_path.iterdir()) == [path]


def half_written(path: Path) -> None:
    with atomic_io.replacing(path) as file:
        file.write(b"half of the n")
        raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    atomic_io.write(path, b"old")
    with pytest.raises(OSError, match="disk full"):
        half_written(path)
    with pytest.raises(TypeError):
        atomic_io.write_json(path, object())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_write_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    path, flushed = tmp_path / "state", []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(path.exists()))
    atomic_io.write(path, b"x", durable=durable)
    assert flushed == ([False] if durable else [])


def test_nothing_is_written_through_a_symlink(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    path = tmp_path / "tracking.json"
    path.symlink_to(other)
    path.with_name(".tracking.json.writing").symlink_to(other)
    atomic_io.write(path, "new")
    assert other.read_text() == "mine"
    assert not path.is_symlink()
    assert path.read_text() == "new"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"

    def fill() -> None:
        with atomic_io.replacing(path):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"summary\.json"):
        fill()
