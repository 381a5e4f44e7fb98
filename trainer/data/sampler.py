"""Which rows the next update reads. The cursor is trainer state: it is saved and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset import MixtureComponent
from trainer.data.epoch_permutation import EpochPermutation
from trainer.runtime.errors import BadInput

#: Rows behind the next one among which an update looks for those that fill it.
WINDOW = 64
_BLOCK = 1024


class TokenBudgetSampler:
    """Walks through shuffled rows, epoch after epoch, in portions of about as many tokens.

    The order of an epoch is a pure function of (seed, epoch, number of rows): it depends neither on
    ranks, micro-batches or other prompts, nor on how the run came here. An update reads rows in
    this order as long as they fit into its tokens, and fills what is left with the longest rows
    that fit among the next ``WINDOW`` of the epoch; those are not read again. So it is nearly full,
    never over, and no row waits for more than one update.

    Args:
        lengths: useful tokens of each row, all positive.
        tokens_per_step: an update takes rows until no other fits into this.
        seed: of the order.
        sources: ranges of rows that are mixed by weight; default: all rows are one source.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int32],
        tokens_per_step: int,
        seed: int,
        sources: Sequence[MixtureComponent] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, np.int32)
        if not len(self._lengths) or int(self._lengths.min()) <= 0:
            raise ValueError("a cursor needs rows, each with at least one token")
        if tokens_per_step <= 0:
            raise ValueError(f"tokens_per_step must be positive, got {tokens_per_step}")
        self._tokens_per_step = tokens_per_step
        self._seed = seed
        self._order = EpochPermutation(sources or [MixtureComponent(0, len(self._lengths))], seed)
        self._epoch = 0
        self._position = 0
        self._ahead: set[int] = set()
        self._blocks: dict[tuple[int, int], list[int]] = {}

    @property
    def epoch(self) -> int:
        """Epochs begun and finished before the next row: 0 until every row was read once."""
        return self._epoch

    @property
    def position(self) -> int:
        """Rows of this epoch that were read."""
        return self._position + len(self._ahead)

    def next_rows(self) -> list[int]:
        """Rows of the next update: at least one; a short file is read more than once."""
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
        """Rows of the window for what is left of an update, the longest that fits first."""
        last = min(self._position + WINDOW, len(self._lengths))
        places = [p for p in range(self._position + 1, last) if p not in self._ahead]
        waiting = [(int(self._lengths[self._row(p)]), p) for p in places] if room > 0 else []
        rows = []
        for length, place in sorted(waiting, key=lambda item: (-item[0], item[1])):
            if length <= room:
                rows.append(self._row(place))
                self._ahead.add(place)
                room -= length
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "ahead": sorted(self._ahead),
            "seed": self._seed,
            "rows": len(self._lengths),
            "lengths_digest": self._digest,
            "order": self._order.identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            BadInput: it was taken with another seed or other rows, whose order would differ.
        """
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
        self._ahead = set(state["ahead"])

    def _advance(self) -> None:
        self._position += 1
        while self._position in self._ahead:
            self._ahead.remove(self._position)
            self._position += 1
        if self._position == len(self._lengths):
            self._epoch, self._position = self._epoch + 1, 0

    def _row(self, position: int) -> int:
        """The row at a place of this epoch; places are looked up in blocks, of which few stay."""
        key = (self._epoch, position // _BLOCK)
        if key not in self._blocks:
            if len(self._blocks) > 2:
                self._blocks.pop(next(iter(self._blocks)))
            start = key[1] * _BLOCK
            places = np.arange(start, min(start + _BLOCK, len(self._lengths)))
            self._blocks[key] = self._order.rows(self._epoch, places).tolist()
        return self._blocks[key][position % _BLOCK]

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._lengths.astype("<i4").tobytes()).hexdigest()[:16]
