"""SHA-256 digests of a base's files: a run resumes only if they are unchanged.

The hub's cache names weight files by their SHA-256. Digests of other large files are cached by
path, size, times and inode, so that not every run reads these files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.model.checkpoint_files import BaseFiles
from trainer.model.model_folder import INDEX, SMALL_FILES
from trainer.runtime import atomic_io
from trainer.runtime.cache_dir import cache_dir
from trainer.runtime.json_file import read_json_object

#: Digests of smaller files are not cached.
MIN_CACHED_BYTES = 256 << 20
#: Small files of a model's folder that do not belong to the tokenizer.
_NOT_TOKENIZER = {"config.json", "generation_config.json", INDEX}
_THREADS = 8
#: In place of a digest: a GGUF file contains config and weights.
IN_WEIGHTS = "in the weights' file"


def combine_digests(files: BaseFiles, weights: Mapping[str, str]) -> dict[str, str]:
    """Digests of a base's files, by the name used in errors.

    Args:
        weights: digests of all weight files, by file name.
    """
    small = set(files.small_files(*SMALL_FILES))
    tokenizer = sorted(path for path in small if path.name not in _NOT_TOKENIZER)
    config = [path for path in small if path.name == "config.json"]
    template = json.dumps(getattr(files.tokenizer, "chat_template", None), sort_keys=True)
    settings = files.generation.to_diff_dict()
    settings.pop("transformers_version", None)
    generation = json.dumps(settings, sort_keys=True, default=str)
    return {
        "base.model, its config": _digest(config[0]) if config else IN_WEIGHTS,
        "base.model, its tokenizer": _combine((path.name, _digest(path)) for path in tokenizer),
        "base.model, its chat template": hashlib.sha256(template.encode()).hexdigest(),
        "base.model, its generation config": hashlib.sha256(generation.encode()).hexdigest(),
        "base.model, its weights": _combine(sorted(weights.items())),
    }


def digest_weight_files(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of the content of weight files, by file name."""
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing releases the GIL
        return dict(zip([p.name for p in paths], threads.map(digest_file, paths), strict=True))


def fingerprint_base(files: BaseFiles) -> dict[str, str]:
    """Digests of a base's files, computed by this process alone."""
    return combine_digests(files, digest_weight_files(files.weight_files))


def digest_file(path: Path) -> str:
    """SHA-256 of a weight file's content."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # huggingface_hub has verified it
    stat = real.stat()
    if stat.st_size < MIN_CACHED_BYTES:
        return _digest(real)
    key = hashlib.sha256(str(real).encode()).hexdigest()[:32]
    record = cache_dir("digests") / f"{key}.json"
    file = [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    with contextlib.suppress(ValueError, KeyError):  # missing or damaged
        cached = read_json_object(record)
        if cached["file"] == file:
            return str(cached["sha256"])
    digest = _digest(real)
    with contextlib.suppress(OSError):  # disk full, or not writable
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write_json(record, {"file": file, "sha256": digest})
    return digest


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _combine(parts: Iterable[tuple[str, str]]) -> str:
    text = "".join(f"{name} {digest}\n" for name, digest in parts)
    return hashlib.sha256(text.encode()).hexdigest()
