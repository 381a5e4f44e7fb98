"""Cache of tokenized splits, keyed by a digest of everything that determines them.

The folder ``tokens`` of the cache directory can be deleted at any time. Entries unused for 30 days
are deleted when a new one is written. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from trainer.data.token_table import FORMAT, TokenBlock, TokenTable, open_table, write
from trainer.runtime.cache_dir import cache_dir
from trainer.runtime.json_file import read_json_object

#: Version of the tokenization rules. Increment it when the same settings give other tokens.
RULES = 8
KEPT_SECONDS = 30 * 24 * 3600
_RECORD = "table.json"
_BLOCK_BYTES = 1 << 20


def cached(
    identity: Mapping[str, Any],
    make: Callable[[], Iterable[TokenBlock]],
    counts: Callable[[], dict[str, int]],
) -> tuple[TokenTable, dict[str, int]]:
    """Return a table and its counts, memory-mapped from the cache; create them if missing.

    If several processes need the same table, one creates it while the others wait. If the creating
    process dies, another one creates it. Without a writable cache, the table is private.

    Args:
        identity: JSON values that determine the table.
        make: yields the blocks of the table.
        counts: returns counts that are stored with the table; called after ``make``.
    """
    text = json.dumps([FORMAT, RULES, identity], sort_keys=True)
    folder = cache_dir("tokens") / hashlib.sha256(text.encode()).hexdigest()[:32]
    if (entry := _open(folder)) is not None:
        return entry
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("a")
    except OSError:
        return _private(make, counts)
    with lock:
        is_locked = _acquire(lock)
        if (entry := _open(folder)) is not None:  # made while this process waited
            return entry
        if is_locked:
            _clear(folder)
        with contextlib.suppress(OSError):  # disk full; or made by another process without locks
            _publish(folder, make, counts)
    delete_unused(folder.parent)
    return _open(folder) or _private(make, counts)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash everything that determines token ids: vocabulary, rules, special tokens, versions."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = {
        k: v for k, v in getattr(tokenizer, "init_kwargs", {}).items() if k != "name_or_path"
    }
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab()),
        repr(sorted(settings.items())),
        repr(getattr(tokenizer, "special_tokens_map", None)),
        repr(getattr(tokenizer, "chat_template", None)),
        version("transformers"),
        version("tokenizers"),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _open(folder: Path) -> tuple[TokenTable, dict[str, int]] | None:
    """Open a complete table; None if it is missing or damaged."""
    try:
        record = read_json_object(folder / _RECORD)
        if record != _record(record["table"], folder):
            return None
        table = open_table(folder, record["table"])
        with contextlib.suppress(OSError):
            os.utime(folder)  # mark as used
        return table, record["table"]
    except (OSError, ValueError, KeyError, EOFError, TypeError):
        return None


def _publish(
    folder: Path, make: Callable[[], Iterable[TokenBlock]], counts: Callable[[], dict[str, int]]
) -> None:
    """Write to a temporary folder, then rename it, so that an entry is complete or missing."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.writing-", dir=folder.parent))
    try:
        record = _record({**write(temporary, make()), **counts()}, temporary)
        (temporary / _RECORD).write_text(json.dumps(record))
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record(table: dict[str, int], folder: Path) -> dict[str, Any]:
    """Return the sizes and counts of a table, with checksums of these and of its files."""
    checksums = {"table": xxhash.xxh3_64_hexdigest(json.dumps(table, sort_keys=True).encode())}
    for path in sorted(folder.glob("*.npy")):
        digest = xxhash.xxh3_64()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        checksums[path.name] = digest.hexdigest()
    return {"table": table, "xxh3_64": checksums}


def _private(
    make: Callable[[], Iterable[TokenBlock]], counts: Callable[[], dict[str, int]]
) -> tuple[TokenTable, dict[str, int]]:
    """Create a table for this process only: its files are deleted once mapped."""
    with tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
        record = {**write(Path(folder), make()), **counts()}
        return open_table(Path(folder), record), record


def _acquire(lock: Any) -> bool:
    """Wait for the lock. False: the file system has no locks, so every process does the work."""
    try:
        os.utime(lock.name)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when its holder dies
        return True
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """Delete a damaged table, and files of a writer that died. The caller must hold the lock."""
    for path in [folder, *folder.parent.glob(f"{folder.name}.writing-*")]:
        shutil.rmtree(path, ignore_errors=True)
    folder.unlink(missing_ok=True)  # if it is a file


def delete_unused(folder: Path) -> None:
    """Delete entries unused for ``KEPT_SECONDS``."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < KEPT_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path)  # processes that have it mapped keep the pages
            else:
                path.unlink()
