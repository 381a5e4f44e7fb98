"""Likelihoods of rows under the base without a trained prompt, kept between runs. No torch.

They depend on nothing that a run trains, so that the second run over the same base and rows need
not compute them again. They are kept where tokenized rows are kept, by a digest of all that they
follow from: the base's files, how its weights are stored and multiplied, versions, and the token
ids of the rows, hand-written prompts included.
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

#: Another number where the same base and rows give other likelihoods: a change of the forward pass.
RULES = 1
#: Bytes of weights times tokens of rows from which likelihoods are kept: seconds on a CPU.
WORTHWHILE = 1e12
#: Length of the checksum in front of the values of a file.
CHECKSUM_BYTES = 8


class BaselineCache:
    """Reads and writes likelihoods of rows; for rank 0.

    Args:
        identity: JSON values that the base's predictions are a pure function of.
        num_bytes: of the base's weight files.
    """

    def __init__(self, identity: Mapping[str, Any], num_bytes: int) -> None:
        versions = [version(name) for name in ("torch", "transformers")]
        self._identity = json.dumps([RULES, versions, identity], sort_keys=True)
        self._num_bytes = num_bytes
        self.folder = cache_dir("baselines")

    def read(self, rows: Sequence[Sequence[Example]]) -> NDArray[np.float64] | None:
        """Negative log-likelihoods [rows, candidates] that ``write`` has kept, or None.

        A damaged file counts as none: its checksum is compared.
        """
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
            os.utime(path)  # it is in use
        return np.frombuffer(bytearray(values), np.float64).reshape(shape)

    def write(self, rows: Sequence[Sequence[Example]], nll_RC: NDArray[np.float64]) -> None:
        """Keep what ``read`` gives next time; nothing where the cache cannot be written.

        Values that are not finite are not kept: they may come from a fault that does not repeat.
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
                digest.update(repr((example.input_ids, example.label_spans)).encode())
        return self.folder / f"{digest.hexdigest()[:32]}.nll"
