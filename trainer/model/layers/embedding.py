"""Word embeddings: a table of which a rank holds some rows and asks its neighbours for the others.

A packed batch reads a few of the table's rows, so the table is not gathered. Each rank of a shard
group holds a block of consecutive rows; a lookup sends ids to their owners and gets rows back. The
head may be the same table, and reads the same block (``trainer.model.layers.lm_head``).

Shape letters: V vocabulary, H hidden size, R rows of a block, N different ids of a lookup.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.layers.quantization import INT8_MAX
from trainer.model.layers.row_exchange import RowExchange, block_rows


class FrozenEmbedding(nn.Module):
    """Word embeddings kept in the checkpoint's type, or in int8, and read in the compute type.

    Attributes:
        weight: Parameter [V, H], float or int8, until ``hold`` has replaced it by rows.
        rows: buffer [R, H] after ``hold``: this rank's block of the table.
        absmax: fp32 buffer [V], present when the weight is int8.
        tied: the head is the same table.
        scale: what every embedding is multiplied by (Gemma: the root of the hidden size), rounded
            to the compute type as the model was trained with it.
    """

    rows: Tensor | None
    absmax: Tensor | None

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.scale = torch.tensor(scale, device="cpu").to(dtype).item()
        self.tied = False
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device="meta"), requires_grad=False
        )
        self.register_buffer("rows", None)
        self.register_buffer("absmax", None)
        self._exchange: RowExchange | None = None

    def hold(self, rows_RH: Tensor, exchange: RowExchange | None) -> None:
        """Keep this rank's block in place of the table; it may lie in host memory.

        Args:
            exchange: the ranks that hold the other blocks; None if this one is all.
        """
        self.register_parameter("weight", None)  # nothing is left for ZeRO-3 to shard and gather
        self.rows, self._exchange = rows_RH, exchange

    def forward(self, token_ids: Tensor) -> Tensor:
        """[..., H] of ids [...]; on a block, all ranks of the exchange call it together."""
        embedded = self._stored(token_ids)
        if self.absmax is not None:
            embedded = embedded.float() * (self.absmax / INT8_MAX)[token_ids, None]
        embedded = embedded.to(self.dtype)
        return embedded if self.scale == 1.0 else embedded * self.scale

    def _stored(self, token_ids: Tensor) -> Tensor:
        """The rows of ids as they are stored."""
        if self.rows is None:
            return nn.functional.embedding(token_ids, self.weight)
        if self._exchange is None:
            return _take(self.rows, token_ids)
        # Sorted, so that the ids of one owner stand together.
        wanted_N, places = token_ids.unique(return_inverse=True)
        return nn.functional.embedding(places, self._fetch(wanted_N, self._exchange))

    def _fetch(self, wanted_N: Tensor, exchange: RowExchange) -> Tensor:
        """Rows [N, H] of sorted ids, each from its owner: counts first, then ids, then rows."""
        assert self.rows is not None
        ranks, size = exchange.ranks, block_rows(self.num_embeddings, exchange.ranks)
        firsts = torch.arange(ranks + 1, device=wanted_N.device) * size
        ends = torch.searchsorted(wanted_N, firsts.clamp(max=self.num_embeddings))
        wanted_counts = ends.diff()
        asked_counts = exchange.swap(wanted_counts, [1] * ranks, [1] * ranks)
        wanted, asked = torch.stack([wanted_counts, asked_counts]).tolist()
        if sum(wanted) != len(wanted_N):
            raise IndexError(f"a token id is not within 0 and {self.num_embeddings - 1}")
        asked_ids = exchange.swap(wanted_N, wanted, asked)
        own = _take(self.rows, asked_ids - exchange.rank * size)
        return exchange.swap(own, asked, wanted)


def _take(rows: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table that may lie elsewhere than the ids, on the device of the ids."""
    return nn.functional.embedding(ids.to(rows.device), rows).to(ids.device)
