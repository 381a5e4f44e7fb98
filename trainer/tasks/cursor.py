"""Which rows the next update reads. The cursor is trainer state: it is saved and resumed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.errors import BadInput


class Cursor:
    """Walks through shuffled rows, epoch after epoch, in portions of about as many tokens.

    The order of an epoch is a pure function of (seed, epoch, number of rows): it depends neither on
    ranks, micro-batches or other prompts, nor on how the run came here.

    Args:
        lengths: useful tokens of each row, all positive.
        tokens_per_step: an update takes rows until their tokens reach this.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], tokens_per_step: int, seed: int) -> None:
        if not lengths or min(lengths) <= 0:
            raise ValueError("a cursor needs rows, each with at least one token")
        if tokens_per_step <= 0:
            raise ValueError(f"tokens_per_step must be positive, got {tokens_per_step}")
        self._lengths = list(lengths)
        self._tokens_per_step = tokens_per_step
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Epochs begun and finished before the next row: 0 until every row was read once."""
        return self._epoch

    @property
    def position(self) -> int:
        """Rows of this epoch that were read."""
        return self._position

    def next_rows(self) -> list[int]:
        """Rows of the next update: at least one; a short file is read more than once."""
        rows: list[int] = []
        tokens = 0
        while tokens < self._tokens_per_step:
            row = self._order[self._position]
            rows.append(row)
            tokens += self._lengths[row]
            self._advance()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "rows": len(self._lengths),
            "lengths_digest": self._digest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            BadInput: it was taken with another seed or other rows, whose order would differ.
        """
        now = self.state_dict()
        names = {"seed": "seed", "rows": "number of rows", "lengths_digest": "tokens of the rows"}
        problems = [
            f"resume: {name} of the training data was {state.get(key)} and is now {now[key]}; "
            f"restore it, or start in another output_dir"
            for key, name in names.items()
            if state.get(key) != now[key]
        ]
        if problems:
            raise BadInput(problems)
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self._epoch)

    def _advance(self) -> None:
        self._position += 1
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        # random() of a seeded Random is the same on every Python version; shuffle() need not be,
        # and numpy promises neither.
        draw = random.Random(f"{self._seed}/{epoch}").random
        keys = [draw() for _ in self._lengths]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._lengths).encode()).hexdigest()[:16]
