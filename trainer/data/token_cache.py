"""Tables of tokenised rows, kept by a digest of all that they follow from. Imports no torch.

``$PROMPTSHARD_CACHE``, else ``$XDG_CACHE_HOME/promptshard``, else ``~/.cache/promptshard``. It is
safe to delete at any time; what was not used for 30 days is deleted when something new is written.
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

#: Another number where the same settings give other tokens: a change of how rows are tokenized.
RULES = 4
KEPT_SECONDS = 30 * 24 * 3600
_RECORD = "table.json"
_BLOCK_BYTES = 1 << 20


def cached(
    identity: Mapping[str, Any],
    make: Callable[[], Iterable[TokenBlock]],
    counts: Callable[[], dict[str, int]],
) -> tuple[TokenTable, dict[str, int]]:
    """The table of this identity: mapped from the cache, or made and put there.

    Runs and ranks that want the same table at once wait for the one that makes it; if that one
    dies, the next makes it. Where the cache cannot be written, the table is this process's own.

    Args:
        identity: JSON values that the table is a pure function of.
        make: its blocks; what it raises is raised.
        counts: asked for once they are made; kept beside the table.
    """
    text = json.dumps([FORMAT, RULES, identity], sort_keys=True)
    place = cache_dir("tokens") / hashlib.sha256(text.encode()).hexdigest()[:32]
    found = _open(place)
    if found is not None:
        return found
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_suffix(".lock").open("a")
    except OSError:
        return _private(make, counts)
    with lock:
        locked = _wait_for(lock)
        found = _open(place)  # made while this process waited
        if found is not None:
            return found
        if locked:
            _clear(place)
        with contextlib.suppress(OSError):  # full; or made by another, where nothing can be locked
            _publish(place, make, counts)
    forget_old(place.parent)
    found = _open(place)
    return found if found is not None else _private(make, counts)


def tokenizer_digest(tokenizer: Any) -> str:
    """Of all that makes the ids of a text: vocabulary, rules, special tokens, versions."""
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


def _open(place: Path) -> tuple[TokenTable, dict[str, int]] | None:
    """A whole table, or None; a damaged one counts as none."""
    try:
        record = read_json_object(place / _RECORD)
        if record != _record(record["table"], place):
            return None
        table = open_table(place, record["table"])
        with contextlib.suppress(OSError):
            os.utime(place)  # it is in use
        return table, record["table"]
    except (OSError, ValueError, KeyError, EOFError, TypeError):
        return None


def _publish(
    place: Path, make: Callable[[], Iterable[TokenBlock]], counts: Callable[[], dict[str, int]]
) -> None:
    """Write under another name, then rename: a table is there as a whole or not at all."""
    folder = Path(tempfile.mkdtemp(prefix=f"{place.name}.writing-", dir=place.parent))
    try:
        record = _record(_write(folder, make, counts), folder)
        (folder / _RECORD).write_text(json.dumps(record))
        os.rename(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _record(table: dict[str, int], folder: Path) -> dict[str, Any]:
    """What is kept beside a table: its sizes and counts, and checksums of these and of its files.

    The files are read as streams, at the speed of the disk.
    """
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
    """A table of this process alone: its files have no name once they are mapped."""
    with tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
        sizes = _write(Path(folder), make, counts)
        return open_table(Path(folder), sizes), sizes


def _write(
    folder: Path, make: Callable[[], Iterable[TokenBlock]], counts: Callable[[], dict[str, int]]
) -> dict[str, int]:
    return {**write(folder, make()), **counts()}


def _wait_for(lock: Any) -> bool:
    """Whether we hold the lock now; False on a file system without locks: then all work."""
    try:
        os.utime(lock.name)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when its holder dies
        return True
    except OSError:
        return False


def _clear(place: Path) -> None:
    """Delete a damaged table, and what one that died while it wrote has left; we hold the lock."""
    for left in [place, *place.parent.glob(f"{place.name}.writing-*")]:
        shutil.rmtree(left, ignore_errors=True)
    place.unlink(missing_ok=True)  # where it is no folder


def forget_old(folder: Path) -> None:
    """Delete what was not used for 30 days."""
    for place in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - place.stat().st_mtime < KEPT_SECONDS:
                continue
            if place.is_dir():
                shutil.rmtree(place)  # those who have it mapped keep it
            else:
                place.unlink()
