"""Locks of files that one process at a time may write."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from trainer.runtime.errors import BadInput
from trainer.runtime.file_lock import exclusive


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path, "taken"), pytest.raises(BadInput, match="taken"), exclusive(path, "taken"):
        pytest.fail("acquired twice")
    with exclusive(path, "taken"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_refuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    entered = False
    with exclusive(tmp_path / "lock", "taken"):
        entered = True
    assert entered
