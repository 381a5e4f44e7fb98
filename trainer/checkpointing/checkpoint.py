"""Checkpoints: small, atomic, checksummed, independent of the number of ranks.

    FOLDER/step-00000300/state.safetensors   every tensor
                         state.json          everything else
                         manifest.json       size and sha256 of the two

A checkpoint is written under a temporary name, flushed to disk and renamed, so a folder with the
final name is complete; the checksums detect later damage. It contains only safetensors and JSON:
loading never executes code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json

logger = logging.getLogger(__name__)

FORMAT = 1
#: Retries if the file system fails, for example a network file system.
READ_ATTEMPTS, READ_PAUSE_SECONDS = 4, 1.0
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
# Prefixes of folders: being written; moved away while its successor is renamed; being deleted.
WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that passed its checksums."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]  #: as JSON has it: tuples are lists, and keys of mappings are strings
    path: Path


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint; later training steps do not change it."""

    step: int
    tensors: dict[str, Tensor]  #: on the CPU
    state: bytes  #: JSON


class _Damaged(Exception):
    """A checkpoint is not usable; the message has the reason."""


def take_snapshot(step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Snapshot:
    """Copy a run's current state.

    Args:
        tensors: must never change, like those of ``Bank.state_dict``; only views and tensors of
            another device are copied here.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return Snapshot(step, plain, json.dumps(dict(state), indent=1).encode())


def write(
    folder: Path, snapshot: Snapshot, keep: int, warn: Callable[[str], None] = logger.warning
) -> Path:
    """Write one checkpoint, then delete all but the newest ``keep``.

    Only one thread of one process may write to a folder. If the process is killed at any point,
    ``newest`` finds this checkpoint or the previous one. Checkpoints of later steps are deleted
    too: they are damaged ones that a resume has skipped.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are intact.
    """
    assert keep >= 1, keep
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _flush(folder.parent)
    _clean_up(folder)
    final = folder / f"step-{snapshot.step:08d}"
    writing = folder / (WRITING + final.name)
    try:
        _write_files(writing, snapshot)
        _publish(writing, final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    _delete_others(folder, snapshot.step, keep, warn)
    return final


def newest(
    folder: Path,
    warn: Callable[[str], None] = logger.warning,
    problem_of: Callable[[int, Mapping[str, Any]], str | None] = lambda step, state: None,
) -> SavedCheckpoint | None:
    """Read the newest intact checkpoint; None if there are no checkpoints.

    Folder names give the order; a checkpoint with wrong checksums is skipped with a warning.

    Args:
        problem_of: given the step and the state, returns why the state is not usable, or None; an
            unusable checkpoint is skipped too.

    Raises:
        BadInput: there are checkpoints, but none is usable, or the file system does not return a
            newer one that may be intact. Starting over, or from an older one, would silently
            discard work.
    """
    problems = []
    for path in _candidates(folder):
        try:
            saved = _read_with_retries(path)
            if problem := problem_of(saved.step, saved.state):
                raise _Damaged(f"{STATE}: {problem}")
            return saved
        except _Damaged as error:
            problems.append(f"{path}: {error}")
            warn(f"checkpoint skipped: {path}: {error}")
    if problems:
        remedy = "restore one from a copy, or give another output_dir to start over"
        raise BadInput([*problems, f"{folder}: no checkpoint is usable; {remedy}"])
    return None


def intact(folder: Path, warn: Callable[[str], None] = logger.warning) -> list[SavedCheckpoint]:
    """Read all intact checkpoints, oldest first; damaged ones are skipped with a warning."""
    by_step: dict[int, SavedCheckpoint] = {}
    for path in _candidates(folder):
        try:
            saved = _read_with_retries(path)
            by_step.setdefault(saved.step, saved)
        except _Damaged as error:
            warn(f"checkpoint skipped: {path}: {error}")
    return [by_step[step] for step in sorted(by_step)]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _candidates(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first, with those whose successor was not renamed yet."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"({re.escape(REPLACED)})?step-\d{{8,}}")
    paths = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    return sorted(paths, key=lambda p: (_step(p), not p.name.startswith(REPLACED)), reverse=True)


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    files = {TENSORS: to_bytes(snapshot.tensors), STATE: snapshot.state}
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    folder.mkdir()
    for name, content in files.items():
        atomic_io.write(folder / name, content, durable=True)
    atomic_io.write(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)
    _flush(folder)


def _flush(folder: Path) -> None:
    """Flush the folder's entries to disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(writing: Path, final: Path) -> None:
    """Rename a checkpoint to its final name, after moving away one that has it already."""
    replaced = final.with_name(REPLACED + final.name)
    if os.path.lexists(final):
        _delete(replaced)
        final.rename(replaced)
    writing.rename(final)
    _flush(final.parent)
    _delete(replaced)


def _delete_others(folder: Path, step: int, keep: int, warn: Callable[[str], None]) -> None:
    for path in _candidates(folder):
        if _step(path) > step:
            warn(f"checkpoint of a later step deleted after saving step {step}: {path}")
        elif keep > 0:
            keep -= 1
            continue
        _delete(path)


def _clean_up(folder: Path) -> None:
    """Delete what an interrupted ``write`` has left."""
    for path in folder.iterdir():
        if path.name.startswith((WRITING, DELETING)):
            _remove(path)
        elif path.name.startswith(REPLACED) and os.path.lexists(
            folder / path.name[len(REPLACED) :]
        ):
            _delete(path)


def _delete(path: Path) -> None:
    """Rename, then delete: a half-deleted checkpoint must not look like a damaged one."""
    if os.path.lexists(path):
        deleting = path.with_name(DELETING + path.name)
        _remove(deleting)
        path.rename(deleting)
        _remove(deleting)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _read_with_retries(path: Path) -> SavedCheckpoint:
    for left in reversed(range(READ_ATTEMPTS)):
        try:
            return _read(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise _Damaged(str(error)) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _Damaged("is a symlink to itself") from None
            if not left:
                raise BadInput(
                    f"{path}: cannot be read: {error.strerror or error}; retry when it is readable"
                ) from None
        time.sleep(READ_PAUSE_SECONDS)
    raise AssertionError("the last attempt returns or raises")


def _read(path: Path) -> SavedCheckpoint:
    try:
        manifest = _json(MANIFEST, (path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise _Damaged(f"{MANIFEST}: is missing") from None
    if manifest.get("format") != FORMAT:
        raise _Damaged(
            f"{MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}"
        )
    if manifest.get("step") != _step(path):
        raise _Damaged(f"{MANIFEST}: step is {manifest.get('step')!r}")
    content, state = (_verified(path / name, manifest) for name in (TENSORS, STATE))
    try:
        tensors = from_bytes(content)
    except SafetensorError as error:
        raise _Damaged(f"{TENSORS}: not a safetensors file: {error}") from None
    return SavedCheckpoint(_step(path), tensors, _json(STATE, state), path)


def _json(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise _Damaged(f"{name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Damaged(f"{name}: not a JSON object")
    return value


def _verified(path: Path, manifest: Mapping[str, Any]) -> bytes:
    try:
        expected = manifest["files"][path.name]
        size, sha256 = expected["bytes"], expected["sha256"]
    except (KeyError, TypeError):
        raise _Damaged(f"{MANIFEST}: does not name {path.name}") from None
    if not path.is_file():
        raise _Damaged(f"{path.name}: is missing")
    if path.stat().st_size != size:
        raise _Damaged(f"{path.name}: has {path.stat().st_size} bytes, should have {size}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _Damaged(f"{path.name}: its sha256 differs from the manifest's")
    return content
