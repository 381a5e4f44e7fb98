"""Collectives of the ranks that share the rows of one table.

Shape letters: M rows of each rank, G ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class RowExchange(Protocol):
    """The ranks that share a table; every method is a collective of all of them.

    Attributes:
        rank, ranks: index of this rank among them, and their number G.
    """

    rank: int
    ranks: int

    def swap(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """All-to-all.

        Args:
            rows: [sum(sent), ...] in the order of the receiving ranks.
            sent, received: number of rows for and from each rank.

        Returns:
            [sum(received), ...] in the order of the sending ranks.
        """

    def gather(self, rows: Tensor) -> Tensor:
        """All-gather rows [M, ...], M equal on all ranks, to [G * M, ...] in rank order."""

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Reduce-scatter [G * M, ...]: this rank's M rows of the sum."""

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce by sum."""

    def maximum(self, values: Tensor) -> Tensor:
        """All-reduce by maximum."""


def block_rows(num_rows: int, ranks: int) -> int:
    """Rows of each rank's block; the last ranks may have fewer."""
    return -(-num_rows // ranks)
