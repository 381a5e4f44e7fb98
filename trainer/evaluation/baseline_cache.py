"""Cache of the likelihoods of rows under the base model without a trained prompt. No torch.

These likelihoods do not depend on training, so a second run on the same base model and rows reuses
them. The key is a digest of the base model's files, how its weights are stored and multiplied,
library versions, and the token ids of the rows, including hand-written prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.token_cache import delete_unused
from trainer.data.token_table import Example
from trainer.runtime import atomic_io
from trainer.runtime.cache_dir import cache_dir

#: Increase when the forward pass changes and the same inputs give other likelihoods.
RULES = 2
#: Cost (bytes of weights times tokens of rows) from which caching is worthwhile: seconds on a CPU.
WORTHWHILE = 1e12
CHECKSUM_BYTES = 8


class BaselineCache:
    """Reads and writes likelihoods of rows; used on rank 0 only.

    Args:
        identity: JSON values that determine the base model's predictions.
        num_bytes: size of the base model's weight files.
    """

    def __init__(self, identity: Mapping[str, Any], num_bytes: int) -> None:
        versions = [version(name) for name in ("torch", "transformers")]
        self._identity = json.dumps([RULES, versions, identity], sort_keys=True)
        self._num_bytes = num_bytes
        self.folder = cache_dir("baselines")

    def read(self, rows: Sequence[Sequence[Example]]) -> NDArray[np.float64] | None:
        """Return negative log-likelihoods [rows, candidates]; None if they are not cached."""
        if not self._is_worthwhile(rows):
            return None
        path, shape = self._path(rows), (len(rows), len(rows[0]))
        try:
            content = path.read_bytes()
        except OSError:
            return None
        checksum, values = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
        if len(values) != 8 * shape[0] * shape[1] or checksum != xxhash.xxh3_64_digest(values):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the oldest files are removed first
        return np.frombuffer(bytearray(values), np.float64).reshape(shape)

    def write(self, rows: Sequence[Sequence[Example]], nll_RC: NDArray[np.float64]) -> None:
        """Cache negative log-likelihoods; does nothing if the cache cannot be written.

        Values that are not finite are not cached, because they may come from a transient fault.
        """
        if not self._is_worthwhile(rows) or not np.isfinite(nll_RC).all():
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_io.replacing(self._path(rows)) as file:
                values = nll_RC.tobytes()
                file.write(xxhash.xxh3_64_digest(values) + values)
            delete_unused(self.folder)

    def _is_worthwhile(self, rows: Sequence[Sequence[Example]]) -> bool:
        return self._num_bytes * sum(row[0].num_tokens for row in rows) >= WORTHWHILE

    def _path(self, rows: Sequence[Sequence[Example]]) -> Path:
        digest = hashlib.sha256(self._identity.encode())
        for row in rows:
            for example in row:
                identity = (example.input_ids, example.label_spans, example.branches)
                digest.update(repr(identity).encode())
        return self.folder / f"{digest.hexdigest()[:32]}.nll"
