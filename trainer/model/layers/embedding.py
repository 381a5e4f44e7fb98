"""Token embeddings, sharded by rows: ranks exchange the rows that a packed batch uses.

Each rank of a shard group holds a block of consecutive rows. A lookup sends token ids to the ranks
that hold their rows and receives the rows, which moves fewer bytes than gathering the table. A tied
head uses the same block (``trainer.model.layers.lm_head``).

Shape letters: V vocabulary, H hidden size, R rows of a block, N distinct ids of a lookup.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.layers.quantization import INT8_MAX
from trainer.model.layers.row_exchange import RowExchange, block_rows


class FrozenEmbedding(nn.Module):
    """Token embeddings stored in the checkpoint's type or int8, returned in the compute type.

    Attributes:
        weight: Parameter [V, H], float or int8, until ``hold`` replaces it with ``rows``.
        rows: buffer [R, H] after ``hold``: this rank's block of the table.
        absmax: fp32 buffer [V] if the weight is int8, else None.
        tied: the head uses the same table.
        scale: factor of every embedding (Gemma: square root of the hidden size), rounded to the
            compute type as in training.
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
        """Replace the table with this rank's block, which may be in host memory.

        Args:
            exchange: the ranks that hold the other blocks; None if this block is the full table.
        """
        self.register_parameter("weight", None)  # so that ZeRO-3 neither shards nor gathers it
        self.rows, self._exchange = rows_RH, exchange

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look up embeddings [..., H] of ids [...]; a collective of ranks that share the table."""
        embedded = self._stored(token_ids)
        if self.absmax is not None:
            embedded = embedded.float() * (self.absmax / INT8_MAX)[token_ids, None]
        embedded = embedded.to(self.dtype)
        return embedded if self.scale == 1.0 else embedded * self.scale

    def _stored(self, token_ids: Tensor) -> Tensor:
        if self.rows is None:
            return nn.functional.embedding(token_ids, self.weight)
        if self._exchange is None:
            return _lookup(self.rows, token_ids)
        # ``unique`` sorts the ids, so those of one rank's block are consecutive.
        ids_N, places = token_ids.unique(return_inverse=True)
        return nn.functional.embedding(places, self._fetch(ids_N, self._exchange))

    def _fetch(self, ids_N: Tensor, exchange: RowExchange) -> Tensor:
        """Rows [N, H] of sorted ids from all ranks: exchange counts, then ids, then rows."""
        assert self.rows is not None
        ranks, size = exchange.ranks, block_rows(self.num_embeddings, exchange.ranks)
        firsts = torch.arange(ranks + 1, device=ids_N.device) * size
        sent_counts = torch.searchsorted(ids_N, firsts.clamp(max=self.num_embeddings)).diff()
        received_counts = exchange.swap(sent_counts, [1] * ranks, [1] * ranks)
        sent, received = torch.stack([sent_counts, received_counts]).tolist()
        if sum(sent) != len(ids_N):
            raise IndexError(f"a token id is not within 0 and {self.num_embeddings - 1}")
        received_ids = exchange.swap(ids_N, sent, received)
        rows = _lookup(self.rows, received_ids - exchange.rank * size)
        return exchange.swap(rows, received, sent)


def _lookup(rows: Tensor, ids: Tensor) -> Tensor:
    """Rows on the device of the ids; the table may be on another."""
    return nn.functional.embedding(ids.to(rows.device), rows).to(ids.device)
