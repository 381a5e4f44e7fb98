"""Which rows are taken, by a hash of what they say. Imports no torch.

A row's fate depends on its own content alone: not on the order of files, other rows or a seed. So
equal rows share it, and rows that are added later move no other. Memory does not grow with rows,
but for the rows of validation (8 bytes each) in ``find_leaks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.bit_mixing import mixed
from trainer.data.disk_arrays import DiskArrays

Hashes = NDArray[np.uint64]
#: Hashes of all rows in order, a piece at a time, as often as asked.
Pieces = Callable[[], Iterator[Hashes]]
#: Numbers of rows, ascending.
Index = NDArray[np.int64]

MOST_NAMED = 3
_SPLIT, _ORDER = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


def split_by_hash(pieces: Pieces, share: float) -> tuple[Index, Index]:
    """(train, validation): a row is validation if its hash falls into the first ``share`` of all.

    Args:
        share: of distinct rows, 0 to 1; what comes out differs from it by chance.
    """
    limit = np.uint64(min(int(share * 2**64), 2**64 - 1))
    kept, held = DiskArrays("int64"), DiskArrays("int64")
    for first, hashes in _numbered(pieces()):
        chosen = _mixed(hashes, _SPLIT) < limit
        held.add(np.flatnonzero(chosen) + first)
        kept.add(np.flatnonzero(~chosen) + first)
    return kept.array(), held.array()


def first_by_hash(pieces: Pieces, count: int) -> Index:
    """The ``count`` rows that come first in an order by hash; of equal rows the earlier.

    There must be as many. Fewer rows are always among more, and the choice is independent of
    ``split_by_hash``.
    """
    limit, room = _threshold(lambda: (_mixed(hashes, _ORDER) for hashes in pieces()), count)
    found = DiskArrays("int64")
    for first, hashes in _numbered(pieces()):
        keys = _mixed(hashes, _ORDER)
        ties = np.flatnonzero(keys == limit)[:room]
        room -= len(ties)
        chosen = keys < limit
        chosen[ties] = True
        found.add(np.flatnonzero(chosen) + first)
    return found.array()


@dataclass(frozen=True)
class Leak:
    """Rows of a validation split that are train rows too.

    Attributes:
        count: how many.
        rows: the first few as (row of the split, the first equal row of train).
    """

    count: int
    rows: tuple[tuple[int, int], ...]


def find_leaks(train: Iterator[Hashes], held: Iterator[Hashes]) -> Leak:
    """Rows of ``held`` whose content is in ``train``, by 64-bit hashes of all rows in order.

    Two different rows have the same hash with a probability of about n_train * n_held / 2^64.
    """
    hashes = np.concatenate([np.zeros(0, np.uint64), *held])
    known = np.unique(hashes)
    if not len(known):
        return Leak(0, ())
    where = np.full(len(known), -1, np.int64)  # the first train row with each hash
    for first, values in _numbered(train):
        at = np.minimum(np.searchsorted(known, values), len(known) - 1)
        hits = np.flatnonzero(known[at] == values)[::-1]  # backwards: the first one stays
        new = hits[where[at[hits]] < 0]
        where[at[new]] = first + new
    of_train = where[np.searchsorted(known, hashes)]
    leaked = np.flatnonzero(of_train >= 0)
    return Leak(len(leaked), tuple((int(i), int(of_train[i])) for i in leaked[:MOST_NAMED]))


def _numbered(pieces: Iterator[Hashes]) -> Iterator[tuple[int, Hashes]]:
    """Each piece with the number of its first row."""
    first = 0
    for hashes in pieces:
        yield first, hashes
        first += len(hashes)


def _mixed(hashes: Hashes, salt: int) -> Hashes:
    """Hashes made independent of other uses of them."""
    return mixed(hashes ^ np.uint64(salt))


def _threshold(keys: Pieces, count: int) -> tuple[np.uint64, int]:
    """The ``count``-th smallest key, and how many keys equal to it belong to the ``count`` first.

    Four passes, each over 16 bits, so that no array of keys is held.
    """
    prefix, left = 0, count
    for shift in (48, 32, 16, 0):
        found = np.zeros(1 << 16, np.int64)
        for values in keys():
            high = values >> np.uint64(shift)
            inside = high[(high >> np.uint64(16)) == prefix] if shift < 48 else high
            found += np.bincount((inside & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
        total = np.cumsum(found)
        digit = int(np.searchsorted(total, left))
        left -= int(total[digit - 1]) if digit else 0
        prefix = prefix << 16 | digit
    return np.uint64(prefix), left
