"""Row selection by a hash of the content: hold-out split, ``max_rows``, leaks. Imports no torch.

The order of rows depends on their content only, not on the order of files or on a seed. Equal rows
are held out together, and adding rows does not move other rows between train and validation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: [R] content hash of each row.
Hashes = NDArray[np.uint64]
#: Ascending numbers of rows.
Index = NDArray[np.int64]

MAX_NAMED_LEAKS = 3
_SPLIT_SALT, _ORDER_SALT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), modulo 2^64.

    Integer arithmetic gives the same result on every version of Python and numpy.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def split_by_hash(hashes: Hashes, share: float) -> tuple[Index, Index]:
    """Split rows into (train, validation): validation if the hash is in the lowest ``share``.

    Args:
        share: expected share of distinct rows in validation, 0 to 1; the actual one varies.
    """
    limit = np.uint64(min(int(share * 2**64), 2**64 - 1))
    is_validation = mix_bits(hashes ^ _SPLIT_SALT) < limit
    return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)


def first_by_hash(hashes: Hashes, count: int) -> Index:
    """Select ``count`` rows, 1 or more, in an order by hash; of equal rows the earlier ones.

    A smaller selection is a subset of a larger one. The order is independent of ``split_by_hash``.
    """
    keys = mix_bits(hashes ^ _ORDER_SALT)
    limit = np.partition(keys, count - 1)[count - 1]
    selected = keys < limit
    ties = np.flatnonzero(keys == limit)
    selected[ties[: count - np.count_nonzero(selected)]] = True
    return np.flatnonzero(selected)


def find_leaks(train: Hashes, validation: Hashes) -> tuple[int, list[tuple[int, int]]]:
    """Find validation rows whose content is in train, by their hashes.

    Two different rows have the same hash with probability n_train * n_validation / 2^64.

    Returns:
        Number of leaked rows; the first few as (row of validation, first equal row of train).
    """
    known = np.unique(validation)  # smaller, so searching it is faster than sorting train
    at = np.minimum(np.searchsorted(known, train), len(known) - 1)
    leaked = np.flatnonzero(np.isin(validation, train[known[at] == train])).tolist()
    first = [(row, int(np.argmax(train == validation[row]))) for row in leaked[:MAX_NAMED_LEAKS]]
    return len(leaked), first
