"""The order of an epoch's rows, computed place by place: nothing is stored, whatever their number.

Only integer arithmetic of our own, modulo 2^64: the same on every version of Python and numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.bit_mixing import mixed
from trainer.data.dataset import MixtureComponent

Integers = NDArray[np.int64]

#: The paper's bound asks for a multiple of log2(rows); with this many, neighbours of five million
#: rows are uncorrelated (tested).
ROUNDS = 64
#: So few rows are sorted by a hash instead, which is cheaper.
FEW_ROWS = 1024
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class EpochPermutation:
    """Rows of every epoch, in order; ``MixtureComponent`` documents weights.

    Args:
        sources: those without rows are left out.
    """

    def __init__(self, sources: Sequence[MixtureComponent], seed: int) -> None:
        self._seed = seed
        self._size = sum(source.stop - source.start for source in sources)
        self._sources = [
            (number, source) for number, source in enumerate(sources) if source.stop > source.start
        ]
        weights = [source.weight for _, source in self._sources]
        self._weighted = [w for w in weights if w is not None]
        assert len(self._weighted) in (0, len(weights)), "all sources have weights, or none"
        self._counts = _shares(self._size, self._weighted)

    @property
    def identity(self) -> str:
        """What else than seed and number of rows the order follows from."""
        mixed = [(s.start, s.stop, s.weight) for _, s in self._sources] if self._weighted else []
        digest = hashlib.sha256(repr(mixed).encode()).hexdigest()[:8]
        return f"swap-or-not {ROUNDS}" + (f", mixed {digest}" if mixed else "")

    def rows(self, epoch: int, places: Integers) -> Integers:
        """The rows at these places of an epoch, ``0 <= places < number of rows``."""
        slots = permuted(places, self._size, f"{self._seed}/{epoch}")
        if not self._weighted:
            return slots
        rows = np.empty_like(slots)
        first = 0
        for (number, source), count in zip(self._sources, self._counts, strict=True):
            mine = (slots >= first) & (slots < first + count)
            size = source.stop - source.start
            # Where in the endless sequence of this source's passes.
            place = epoch * count + slots[mine] - first
            found = np.empty_like(place)
            for read in np.unique(place // size).tolist():
                of_pass = place // size == read
                key = f"{self._seed}/{number}/{read}"
                found[of_pass] = permuted(place[of_pass] % size, size, key)
            rows[mine] = source.start + found
            first += count
        return rows


def permuted(places: Integers, size: int, key: str) -> Integers:
    """Where a pseudorandom permutation of ``range(size)`` sends these places.

    Swap-or-not (Hoang, Morris and Rogaway, CRYPTO 2012): in each round a place and its partner,
    whose sum modulo ``size`` is the round's number, change places or not, by a hash of the greater.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    if size <= FEW_ROWS:
        return np.argsort(_hashes(start, size), kind="stable")[places]
    numbers, salts = _hashes(start, 2 * ROUNDS).reshape(2, ROUNDS)
    found = np.asarray(places, np.int64)
    for number, salt in zip((numbers % np.uint64(size)).tolist(), salts, strict=True):
        partner = number - found
        partner += size * (partner < 0)
        greater = np.maximum(found, partner).view(np.uint64)
        swap = (mixed(greater ^ salt) & np.uint64(1)).astype(bool)
        found = np.where(swap, partner, found)
    return found


def _hashes(start: int, count: int) -> NDArray[np.uint64]:
    """The first numbers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    return mixed(np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` divided by weights: whole numbers, by largest remainder, ties to the earlier."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
