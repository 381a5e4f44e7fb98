"""Checkpoints: small, atomic, checksummed, independent of the number of ranks.

    FOLDER/step-00000300/state.safetensors   every tensor
                         state.json          everything else
                         manifest.json       size and sha256 of the two

A checkpoint is written under a temporary name, flushed to disk and renamed, so one that has its
name is whole; the manifest finds what breaks later. safetensors and JSON only: reading one runs no
code.
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
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json

logger = logging.getLogger(__name__)

FORMAT = 1
#: Where the file system fails, not the checkpoint.
READ_ATTEMPTS, READ_PAUSE_SECONDS = 4, 1.0
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
# Being written; put aside while another takes its name; being deleted.
WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that passed its checksums.

    Attributes:
        state: as it was given to ``save``, after a round through JSON: tuples are lists, and keys
            of mappings are strings.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, independent of what training changes later.

    Attributes:
        tensors: on the CPU.
        state: JSON.
    """

    step: int
    tensors: dict[str, Tensor]
    state: bytes


class _Broken(Exception):
    """Why a checkpoint cannot be used."""


def snapshot(step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Snapshot:
    """Take a run's state as it is now.

    Args:
        tensors: must never change, like those of ``Bank.state_dict``; only views and tensors of
            another device are copied here.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return Snapshot(step, plain, json.dumps(dict(state), indent=1).encode())


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """``write`` of a ``snapshot``."""
    return write(folder, snapshot(step, tensors, state), keep)


def write(
    folder: Path, taken: Snapshot, keep: int, warn: Callable[[str], None] = logger.warning
) -> Path:
    """Write one checkpoint, then remove all but the newest ``keep``.

    Only one thread of one process may write to a folder. Whenever it is killed, ``newest`` finds
    this checkpoint or the one before. Checkpoints of later steps go too: they are broken ones that
    a resume has passed over, or of a course that this run has left.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if the disk is full or cannot be written; earlier checkpoints are intact then.
    """
    assert keep >= 1, keep
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _flush(folder.parent)
    _sweep(folder)
    final = folder / _name(taken.step)
    writing = folder / (WRITING + final.name)
    try:
        _write_all(writing, taken)
        _publish(writing, final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    _retire(folder, taken.step, keep, warn)
    return final


def newest(
    folder: Path,
    warn: Callable[[str], None] = logger.warning,
    problem_of: Callable[[int, Mapping[str, Any]], str | None] = lambda step, state: None,
) -> SavedCheckpoint | None:
    """Read the newest checkpoint that is whole; None if there has never been one.

    No file points to it: the folders' names and checksums decide. One that fails its checksums is
    passed over with a warning.

    Args:
        problem_of: says why a state cannot be used, given the step and the state; such a
            checkpoint is passed over too.

    Raises:
        BadInput: if there are checkpoints but none can be used: starting afresh would throw work
            away without a word. So would resuming from an older one, where the file system does
            not give out what may be whole.
    """
    problems = []
    for path in _candidates(folder):
        try:
            saved = _patiently(path)
            if problem := problem_of(saved.step, saved.state):
                raise _Broken(f"{STATE}: {problem}")
            return saved
        except _Broken as error:
            problems.append(f"{path}: {error}")
            warn(f"checkpoint passed over: {path}: {error}")
    if problems:
        remedy = "restore one from a copy, or give another output_dir to start afresh"
        raise BadInput([*problems, f"{folder}: no checkpoint can be used; {remedy}"])
    return None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _candidates(folder: Path) -> list[Path]:
    """Newest first. One put aside counts: its successor may not have got the name."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"({re.escape(REPLACED)})?step-\d{{8,}}")
    paths = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    return sorted(paths, key=lambda p: (_step(p), not p.name.startswith(REPLACED)), reverse=True)


def _write_all(folder: Path, taken: Snapshot) -> None:
    files = {TENSORS: to_bytes(taken.tensors), STATE: taken.state}
    manifest = {
        "format": FORMAT,
        "step": taken.step,
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
    """Make the folder's entries survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(writing: Path, final: Path) -> None:
    """Give a checkpoint its name. A folder cannot be renamed over another: put that aside first."""
    folder = final.parent
    replaced = folder / (REPLACED + final.name)
    if os.path.lexists(final):
        _delete(replaced)
        final.rename(replaced)
    writing.rename(final)
    _flush(folder)
    _delete(replaced)


def _retire(folder: Path, step: int, keep: int, warn: Callable[[str], None]) -> None:
    checkpoints = _candidates(folder)
    later = [path for path in checkpoints if _step(path) > step]
    for path in later:
        warn(f"checkpoint of a later step removed after saving step {step}: {path}")
        _delete(path)
    for path in [p for p in checkpoints if p not in later][keep:]:
        _delete(path)


def _sweep(folder: Path) -> None:
    """Remove what an interrupted ``save`` left behind."""
    for path in folder.iterdir():
        if path.name.startswith((WRITING, DELETING)):
            _remove(path)
        elif path.name.startswith(REPLACED) and os.path.lexists(
            folder / path.name[len(REPLACED) :]
        ):
            _delete(path)


def _delete(path: Path) -> None:
    """Take the name away first: a half-deleted checkpoint must not look like a broken one."""
    if os.path.lexists(path):
        deleting = path.with_name(DELETING + path.name)
        _remove(deleting)
        path.rename(deleting)
        _remove(deleting)


def _remove(path: Path) -> None:
    """Remove a folder with what is in it, or a file or symlink."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _patiently(path: Path) -> SavedCheckpoint:
    """``_read``, tried again where the file system fails for a moment."""
    for left in reversed(range(READ_ATTEMPTS)):
        try:
            return _read(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise _Broken(str(error)) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _Broken("is a symlink that leads back to itself") from None
            if not left:
                raise BadInput(
                    f"{path}: cannot be read: {error.strerror or error}; try again once it can be"
                ) from None
        time.sleep(READ_PAUSE_SECONDS)
    raise AssertionError("the last attempt returns or raises")


def _read(path: Path) -> SavedCheckpoint:
    manifest = _json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise _Broken(f"{MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}")
    if manifest.get("step") != _step(path):
        raise _Broken(f"{MANIFEST}: is of step {manifest.get('step')!r}")
    for name in (TENSORS, STATE):
        _verify(path / name, manifest)
    try:
        tensors = load_file(path / TENSORS)
    except SafetensorError as error:
        raise _Broken(f"{TENSORS}: not a safetensors file: {error}") from None
    return SavedCheckpoint(_step(path), tensors, _json(path / STATE), path)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise _Broken(f"{path.name}: is missing") from None
    except ValueError as error:
        raise _Broken(f"{path.name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Broken(f"{path.name}: not a JSON object")
    return value


def _verify(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        expected = manifest["files"][path.name]
        size, sha256 = expected["bytes"], expected["sha256"]
    except (KeyError, TypeError):
        raise _Broken(f"{MANIFEST}: does not name {path.name}") from None
    if not path.is_file():
        raise _Broken(f"{path.name}: is missing")
    if path.stat().st_size != size:
        raise _Broken(f"{path.name}: has {path.stat().st_size} bytes, should have {size}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise _Broken(f"{path.name}: its sha256 differs from the manifest's")
