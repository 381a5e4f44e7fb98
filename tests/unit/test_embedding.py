"""Lookups in a table sharded by rows against the full table."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.thread_ranks import Thread, on_all_ranks
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.layers.quantization import quantize_rows
from trainer.model.layers.row_exchange import block_rows

V, H, RANKS = 23, 5, 4  # blocks of 6, 6, 6 and 5 rows

#: Token ids that each rank looks up at the same time.
ASKED: dict[str, list[list[int]]] = {
    "anywhere": [[3, 22, 9], [0, 6, 12, 18, 1, 1, 7], [22, 22, 22], [17, 5]],
    "one owner": [[6, 7], [8], [11, 6, 6, 10], [7, 8, 9]],
    "own rows only": [[0, 5], [6, 11], [12, 17], [18, 22]],
    "some ranks none": [[], [20, 2], [], []],
    "no rank any": [[], [], [], []],
    "all": [list(range(V)), list(range(V))[::-1], list(range(V)), [4]],
}


def layer(stored: str, exchange: Thread | None = None) -> FrozenEmbedding:
    """A rank's block, or with no exchange the whole table."""
    table_VH = torch.randn(V, H, generator=torch.Generator().manual_seed(0))
    embedding = FrozenEmbedding(V, H, torch.float32, scale=3.0)
    if stored == "int8":
        table_VH, embedding.absmax = quantize_rows(table_VH)
    else:
        table_VH = table_VH.to(getattr(torch, stored))
    if exchange is None:
        embedding.weight = torch.nn.Parameter(table_VH, requires_grad=False)
        return embedding
    size = block_rows(V, RANKS)
    rows_RH = table_VH.new_zeros(size, H)
    own = table_VH[exchange.rank * size : (exchange.rank + 1) * size]
    rows_RH[: len(own)] = own
    embedding.hold(rows_RH, exchange)
    return embedding


def look_up(stored: str, asked: Sequence[Tensor]) -> list[Tensor]:
    rows, _ = on_all_ranks(RANKS, lambda rank: layer(stored, rank)(asked[rank.rank]))
    return rows


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_row_blocks_look_up_what_the_full_table_does(stored: str, asked: list[list[int]]) -> None:
    ids = [torch.tensor(one, dtype=torch.long) for one in asked]
    table = layer(stored)
    for one, rows in zip(ids, look_up(stored, ids), strict=True):
        assert torch.equal(rows, table(one))
        assert rows.dtype == torch.float32
        assert not rows.requires_grad


def test_ids_of_any_shape() -> None:
    ids = [torch.arange(12).view(2, 6) + rank for rank in range(RANKS)]
    table = layer("float32")
    for one, rows in zip(ids, look_up("float32", ids), strict=True):
        assert rows.shape == (2, 6, H)
        assert torch.equal(rows, table(one))


def test_a_rank_with_all_rows_exchanges_nothing() -> None:
    complete, alone = layer("int8"), layer("int8")
    alone.hold(complete.weight.data, None)
    ids = torch.tensor([[22, 0], [7, 7]])
    assert torch.equal(alone(ids), complete(ids))
    assert list(alone.parameters()) == []


@pytest.mark.parametrize("bad", [V, -1])
def test_an_id_beyond_the_table_is_no_padding_row(bad: int) -> None:
    ids = [torch.tensor([bad, 1])] * RANKS
    with pytest.raises(IndexError, match="not within 0 and 22"):
        look_up("float32", ids)
