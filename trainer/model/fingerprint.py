"""Digests of the parts of a base: a run resumes only over the same bytes.

The weights are read once for it. The hub's cache names them by their SHA-256 already, and that of
other large files is remembered by size, times and inode, so that not every run reads them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.model.checkpoint_files import BaseFiles
from trainer.model.model_folder import INDEX, SMALL_FILES
from trainer.runtime import atomic_io
from trainer.runtime.cache_dir import cache_dir
from trainer.runtime.json_file import read_json_object

#: Smaller files are read again faster than they are looked up.
REMEMBERED_BYTES = 256 << 20
#: Files of a model's folder that say nothing about the text or the weights.
_NOT_TOKENIZER = {"config.json", "generation_config.json", INDEX}
_THREADS = 8


def digest_small_files(files: BaseFiles) -> dict[str, str]:
    """Digests of all but the weights, by the words that an error names them with."""
    paths = {path for pattern in SMALL_FILES for path in files.folder.glob(pattern)}
    tokenizer = sorted(path for path in paths if path.name not in _NOT_TOKENIZER)
    template = json.dumps(getattr(files.tokenizer, "chat_template", None), sort_keys=True)
    settings = files.generation.to_diff_dict()
    settings.pop("transformers_version", None)
    generation = json.dumps(settings, sort_keys=True, default=str)
    return {
        "base.model, its config": _of_file(files.folder / "config.json"),
        "base.model, its tokenizer": _joined((path.name, _of_file(path)) for path in tokenizer),
        "base.model, its chat template": hashlib.sha256(template.encode()).hexdigest(),
        "base.model, its generation config": hashlib.sha256(generation.encode()).hexdigest(),
    }


def weight_files(files: BaseFiles) -> list[Path]:
    return files.weight_files


def combine_weight_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """One digest of those of all weight files, by name."""
    return {"base.model, its weights": _joined(sorted(digests.items()))}


def digest_weight_files(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of the content of weight files, by name."""
    paths = list(paths)
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing leaves the other threads alone
        return dict(zip([p.name for p in paths], threads.map(digest_file, paths), strict=True))


def fingerprint_base(files: BaseFiles) -> dict[str, str]:
    """All parts, read by this process alone."""
    return digest_small_files(files) | combine_weight_digests(
        digest_weight_files(weight_files(files))
    )


def digest_file(path: Path) -> str:
    """SHA-256 of a weight file's content."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # huggingface_hub has checked it
    stat = real.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return _of_file(real)
    key = hashlib.sha256(str(real).encode()).hexdigest()[:32]
    place = cache_dir("digests") / f"{key}.json"
    now = [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    with contextlib.suppress(ValueError, KeyError):  # missing or damaged: digested again
        remembered = read_json_object(place)
        if remembered["file"] == now:
            return str(remembered["sha256"])
    digest = _of_file(real)
    with contextlib.suppress(OSError):  # full, or not ours: it is read again next time
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write_json(place, {"file": now, "sha256": digest})
    return digest


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _joined(parts: Iterable[tuple[str, str]]) -> str:
    text = "".join(f"{name} {digest}\n" for name, digest in parts)
    return hashlib.sha256(text.encode()).hexdigest()
