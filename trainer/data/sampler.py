"""Select the training rows of the next update, by token budget. Imports no torch.

The position of the sampler is saved in checkpoints and restored on resume. The order of an epoch is
computed block by block, so memory does not grow with the number of rows, with integer arithmetic
modulo 2^64, so that it is equal on every version of Python and numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset import MixtureComponent
from trainer.data.row_hashing import mix_bits
from trainer.runtime.errors import BadInput

Integers = NDArray[np.int64]

#: Number of next rows among which an update searches for rows that fill its budget.
WINDOW = 64
_BLOCK = 1024
#: Rounds of swap-or-not. The paper's bound is a multiple of log2(rows). With this number, neighbors
#: among five million rows are uncorrelated (tested).
ROUNDS = 64
#: Up to this number of rows, sorting by a hash is used instead, because it is faster.
FEW_ROWS = 1024
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class TokenBudgetSampler:
    """Iterates over shuffled rows, epoch after epoch, in updates of about equally many tokens.

    The order of an epoch is a pure function of seed, epoch and components: it does not depend on
    ranks, micro-batches, other prompts or resuming. An update reads rows in this order until the
    next one exceeds the budget, and fills the remaining tokens with the longest rows that fit among
    the next ``WINDOW`` of the epoch; those are not read again. So an update is nearly full, and the
    row that exceeded the budget is the first of the next update.

    Args:
        lengths: tokens of each row, all positive.
        tokens_per_step: token budget of an update. A longer row is an update by itself.
        components: ranges of rows that are mixed by weight; default: all rows are one component.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int32],
        tokens_per_step: int,
        seed: int,
        components: Sequence[MixtureComponent] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, np.int32)
        if not len(self._lengths) or int(self._lengths.min()) <= 0:
            raise ValueError("a sampler needs rows, each with at least one token")
        if tokens_per_step <= 0:
            raise ValueError(f"tokens_per_step must be positive, got {tokens_per_step}")
        self._tokens_per_step = tokens_per_step
        self._seed = seed
        components = components or [MixtureComponent(0, len(self._lengths))]
        self._order = EpochPermutation(components, seed)
        self._epoch = 0
        self._position = 0
        self._read_early: set[int] = set()
        self._blocks: dict[tuple[int, int], list[int]] = {}

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def position(self) -> int:
        """Number of rows read in this epoch."""
        return self._position + len(self._read_early)

    def next_rows(self) -> list[int]:
        """Return the rows of the next update: at least one; an update may span several epochs."""
        rows = [self._row(self._position)]
        room = self._tokens_per_step - int(self._lengths[rows[0]])
        self._advance()
        while room > 0:
            row = self._row(self._position)
            if self._lengths[row] > room:
                break
            rows.append(row)
            room -= int(self._lengths[row])
            self._advance()
        return rows + self._fill(room)

    def _fill(self, room: int) -> list[int]:
        """Select rows of the window for the remaining ``room`` tokens, the longest first."""
        last = min(self._position + WINDOW, len(self._lengths))
        places = [p for p in range(self._position + 1, last) if p not in self._read_early]
        waiting = [(int(self._lengths[self._row(p)]), p) for p in places] if room > 0 else []
        rows = []
        for length, place in sorted(waiting, key=lambda item: (-item[0], item[1])):
            if length <= room:
                rows.append(self._row(place))
                self._read_early.add(place)
                room -= length
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and values that identify the order, as JSON values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "ahead": sorted(self._read_early),
            "seed": self._seed,
            "rows": len(self._lengths),
            "lengths_digest": self._lengths_digest,
            "order": self._order.identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; raises ``BadInput`` for another seed or other rows."""
        now = self.state_dict()
        names = {
            "seed": "seed",
            "rows": "number of rows",
            "lengths_digest": "tokens of the rows",
            "order": "order",
        }
        problems = [
            f"resume: {name} of the training data was {state.get(key)} and is now {now[key]}; "
            f"restore it, or start in another output_dir"
            for key, name in names.items()
            if state.get(key) != now[key]
        ]
        if problems:
            raise BadInput(problems)
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._read_early = set(state["ahead"])

    def _advance(self) -> None:
        self._position += 1
        while self._position in self._read_early:
            self._read_early.remove(self._position)
            self._position += 1
        if self._position == len(self._lengths):
            self._epoch, self._position = self._epoch + 1, 0

    def _row(self, position: int) -> int:
        """Return the row at a position of this epoch; blocks of rows are computed and cached."""
        key = (self._epoch, position // _BLOCK)
        if key not in self._blocks:
            if len(self._blocks) > 2:
                self._blocks.pop(next(iter(self._blocks)))
            start = key[1] * _BLOCK
            places = np.arange(start, min(start + _BLOCK, len(self._lengths)))
            self._blocks[key] = self._order.rows(self._epoch, places).tolist()
        return self._blocks[key][position % _BLOCK]

    @cached_property
    def _lengths_digest(self) -> str:
        return hashlib.sha256(self._lengths.astype("<i4").tobytes()).hexdigest()[:16]


class EpochPermutation:
    """Order of the rows in every epoch; ``MixtureComponent`` documents weights."""

    def __init__(self, components: Sequence[MixtureComponent], seed: int) -> None:
        self._seed = seed
        self._size = sum(c.stop - c.start for c in components)
        self._components = [(i, c) for i, c in enumerate(components) if c.stop > c.start]
        weights = [component.weight for _, component in self._components]
        self._weights = [weight for weight in weights if weight is not None]
        assert len(self._weights) in (0, len(weights)), "all components have weights, or none"
        self._counts = weighted_counts(self._size, self._weights)

    @property
    def identity(self) -> str:
        """Text that identifies the order, except for seed and number of rows."""
        mixture = (
            [(c.start, c.stop, c.weight) for _, c in self._components] if self._weights else []
        )
        digest = hashlib.sha256(repr(mixture).encode()).hexdigest()[:8]
        return f"swap-or-not {ROUNDS}" + (f", mixed {digest}" if mixture else "")

    def rows(self, epoch: int, places: Integers) -> Integers:
        """Return the rows at these places of an epoch, ``0 <= places < number of rows``."""
        slots = permute(places, self._size, f"{self._seed}/{epoch}")
        if not self._weights:
            return slots
        rows = np.empty_like(slots)
        first = 0
        for (number, component), count in zip(self._components, self._counts, strict=True):
            of_component = (slots >= first) & (slots < first + count)
            size = component.stop - component.start
            # Place in the concatenated passes of this component.
            place = epoch * count + slots[of_component] - first
            offsets = np.empty_like(place)
            for number_of_pass in np.unique(place // size).tolist():
                of_pass = place // size == number_of_pass
                key = f"{self._seed}/{number}/{number_of_pass}"
                offsets[of_pass] = permute(place[of_pass] % size, size, key)
            rows[of_component] = component.start + offsets
            first += count
        return rows


def permute(places: Integers, size: int, key: str) -> Integers:
    """Map places through a pseudorandom permutation of ``range(size)``.

    Swap-or-not (Hoang, Morris and Rogaway, CRYPTO 2012): in each round, a place and its partner,
    whose sum modulo ``size`` is the round's number, are swapped or not, by a hash of the greater.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    if size <= FEW_ROWS:
        return np.argsort(_split_mix(start, size), kind="stable")[places]
    numbers, salts = _split_mix(start, 2 * ROUNDS).reshape(2, ROUNDS)
    current = np.asarray(places, np.int64)
    for number, salt in zip((numbers % np.uint64(size)).tolist(), salts, strict=True):
        partner = number - current
        partner += size * (partner < 0)
        greater = np.maximum(current, partner).view(np.uint64)
        swap = (mix_bits(greater ^ salt) & np.uint64(1)).astype(bool)
        current = np.where(swap, partner, current)
    return current


def _split_mix(start: int, count: int) -> NDArray[np.uint64]:
    """Return the first ``count`` numbers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    return mix_bits(np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def weighted_counts(total: int, weights: Sequence[float]) -> list[int]:
    """Divide ``total`` into integers by weight: largest remainder, ties to the earlier."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
