"""What ranks that hold the rows of one table together say to each other.

Shape letters: M rows of each rank, G ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class RowExchange(Protocol):
    """The ranks that hold a table together; every method is a collective of all of them.

    Attributes:
        rank: this rank's place among them.
        ranks: how many they are, G.
    """

    rank: int
    ranks: int

    def swap(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Give every rank its part of ``rows`` and get what all have for us.

        Args:
            rows: [sum(sent), ...], those for rank 0 first.
            sent: rows for each rank.
            received: rows from each rank, which the caller knows.

        Returns:
            [sum(received), ...], those from rank 0 first.
        """

    def gather(self, rows: Tensor) -> Tensor:
        """The [M, ...] of every rank, which are of one shape: [G * M, ...], rank 0's first."""

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Sum [G * M, ...] over the ranks, of which each gets its own M rows."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, for all of them."""

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of all ranks, for all of them."""


def block_rows(num_rows: int, ranks: int) -> int:
    """Rows of the block that each rank holds; the last ranks may have fewer."""
    return -(-num_rows // ranks)
