"""Cache of tokenized splits, keyed by a digest of everything that determines them.

It is in the folder ``tokens`` of the cache directory and is safe to delete at any time. Entries
unused for 30 days are deleted when a new one is written. Imports no torch.
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

#: Version of the tokenization rules: incremented when the same settings give other tokens.
RULES = 4
KEPT_SECONDS = 30 * 24 * 3600
_RECORD = "table.json"
_BLOCK_BYTES = 1 << 20


def cached(
    identity: Mapping[str, Any],
    make: Callable[[], Iterable[TokenBlock]],
    counts: Callable[[], dict[str, int]],
) -> tuple[TokenTable, dict[str, int]]:
    """Return the table of this identity: memory-mapped from the cache, or made and stored there.

    Of several processes that need the same table one makes it and the others wait; if that one
    dies, the next one makes it. If the cache is not writable, the table is private to this process.

    Args:
        identity: JSON values that determine the table.
        make: yields its blocks; its exceptions are raised.
        counts: called after ``make``; stored with the table.
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
    """Write under another name, then rename, so that an entry is complete or missing."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.writing-", dir=folder.parent))
    try:
        record = _record({**write(temporary, make()), **counts()}, temporary)
        (temporary / _RECORD).write_text(json.dumps(record))
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record(table: dict[str, int], folder: Path) -> dict[str, Any]:
    """Sizes and counts of a table, and checksums of these and of its files."""
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
    """Make a table for this process only: its files are unlinked once they are mapped."""
    with tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
        record = {**write(Path(folder), make()), **counts()}
        return open_table(Path(folder), record), record


def _acquire(lock: Any) -> bool:
    """Wait for the lock; False on a file system without locks: every process does the work."""
    try:
        os.utime(lock.name)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when its holder dies
        return True
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """Delete a damaged table and the files of a writer that died; the lock is held."""
    for path in [folder, *folder.parent.glob(f"{folder.name}.writing-*")]:
        shutil.rmtree(path, ignore_errors=True)
    folder.unlink(missing_ok=True)  # if it is a file


def delete_unused(folder: Path) -> None:
    """Delete entries that were not used for 30 days."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < KEPT_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path)  # processes that have it mapped keep the pages
            else:
                path.unlink()
