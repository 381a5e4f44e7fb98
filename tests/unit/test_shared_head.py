"""A head sharded in blocks against the full head, exchanging hidden states or gathering it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.thread_ranks import Post, Thread, on_all_ranks
from tests.unit.test_lm_head import KINDS, H, V, make_head, slice_by
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.row_exchange import block_rows

#: Label positions of each rank: even, uneven, none on some or all ranks.
COUNTS = {"even": [9, 9, 9], "uneven": [4, 0, 13], "one rank": [0, 7, 0], "none": [0, 0, 0]}
RANKS = 3


def block(kind: str, exchange: Thread, vocab_size: int = V) -> FrozenHead:
    """A rank's block of ``make_head``."""
    head = make_head(vocab_size, **KINDS[kind])
    size = block_rows(vocab_size, exchange.ranks)
    rows = head.weight.new_zeros(size, H)
    own = head.weight.data[exchange.rank * size : (exchange.rank + 1) * size]
    rows[: len(own)] = own
    head.hold(rows, exchange)
    return head


def rows_of(count: int, seed: int, vocab_size: int = V) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(vocab_size, (count,), generator=draw)
    return torch.randn(count, H, generator=draw), labels_N


def gradients(head: FrozenHead, hidden_NH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    x_NH = hidden_NH.clone().requires_grad_()
    nll_N = head(x_NH, labels_N).loss_N
    (nll_N * torch.arange(1.0, len(nll_N) + 1)).sum().backward()
    assert x_NH.grad is not None
    return nll_N.detach(), x_NH.grad


def check(kind: str, counts: Sequence[int], per_rank: list[tuple[Tensor, Tensor]]) -> None:
    alone = make_head(**KINDS[kind])
    for rank, (nll_N, grad_NH) in enumerate(per_rank):
        wanted_N, wanted_NH = gradients(alone, *rows_of(counts[rank], rank))
        torch.testing.assert_close(nll_N, wanted_N, rtol=2e-6, atol=4e-6)
        # The i-th row's gradient is i times that of a loss: rounding grows with it.
        atol = 1e-5 * max(1, counts[rank])
        torch.testing.assert_close(grad_NH, wanted_NH, rtol=1e-5, atol=atol)


def read_whole(post: Post) -> bool:
    return "maximum" not in post.calls


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_go_to_blocks_where_labels_are_few(
    kind: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slice_by(monkeypatch, 100)

    def work(rank: Thread) -> tuple[Tensor, Tensor]:
        return gradients(block(kind, rank), *rows_of(counts[rank.rank], rank.rank))

    per_rank, post = on_all_ranks(RANKS, work)
    check(kind, counts, per_rank)
    assert not read_whole(post)


@pytest.mark.parametrize("counts", [[9, 4, 1], [400, 2, 1]], ids=["blocks", "table"])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_at_a_shared_position_equal_labels_at_copies_of_it(
    kind: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slice_by(monkeypatch, 100)
    draw = torch.Generator().manual_seed(9)
    places = [torch.randint(count, (2 * count + 1,), generator=draw) for count in counts]
    labels = [torch.randint(V, (len(place_N),), generator=draw) for place_N in places]

    def work(rank: Thread) -> Tensor:
        states_UH, _ = rows_of(counts[rank.rank], rank.rank)
        with torch.no_grad():
            head = block(kind, rank)
            losses = head(states_UH, labels[rank.rank], place_N=places[rank.rank])
        own_N: Tensor = losses.loss_N
        return own_N

    per_rank, post = on_all_ranks(RANKS, work)
    alone = make_head(**KINDS[kind])
    for rank, nll_N in enumerate(per_rank):
        states_UH, _ = rows_of(counts[rank], rank)
        with torch.no_grad():
            wanted_N = alone(states_UH[places[rank]], labels[rank]).loss_N
            here_N = alone(states_UH, labels[rank], place_N=places[rank]).loss_N
        torch.testing.assert_close(nll_N, wanted_N, rtol=2e-6, atol=4e-6)
        torch.testing.assert_close(here_N, wanted_N, rtol=2e-6, atol=4e-6)
    assert read_whole(post) == (counts[0] == 400)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_gathered_where_labels_are_many(kind: str) -> None:
    counts = [400, 2, 0]

    def work(rank: Thread) -> tuple[Tensor, Tensor]:
        return gradients(block(kind, rank), *rows_of(counts[rank.rank], rank.rank))

    per_rank, post = on_all_ranks(RANKS, work)
    check(kind, counts, per_rank)
    assert read_whole(post)


def test_a_kept_table_is_gathered_once_until_it_is_released() -> None:
    def work(rank: Thread) -> list[int]:
        head = block("plain", rank)
        head.keeps = True
        calls = []
        for _ in range(2):
            for _ in range(4):  # in the fourth, the table is already gathered: no collective
                before = len(rank.post.calls)
                gradients(head, *rows_of(80, rank.rank))
                rank.post.exchange(rank.rank, None, "end of stream")
                calls.append(len(rank.post.calls) - before - 1)
            head.release()
        return calls

    per_rank, _ = on_all_ranks(RANKS, work)
    # 80 labels to 3 blocks and back are 480 rows of 1,000; the third time would exceed 1,000.
    assert per_rank[0] == [6, 6, 2, 0, 6, 6, 2, 0]


def test_ranks_with_and_without_a_gradient_stay_in_step() -> None:
    def work(rank: Thread) -> tuple[Tensor, Tensor]:
        head, (hidden_NH, labels_N) = block("plain", rank), rows_of(5, rank.rank)
        if rank.rank == 1:
            nll_N = head(hidden_NH, labels_N).loss_N
            assert not nll_N.requires_grad
            return nll_N, torch.zeros(0)
        return gradients(head, hidden_NH, labels_N)

    per_rank, _ = on_all_ranks(RANKS, work)
    wanted = gradients(make_head(), *rows_of(5, 1))[0]
    torch.testing.assert_close(per_rank[1][0], wanted, rtol=2e-6, atol=4e-6)
    check("plain", [5, 5, 5], [per_rank[0], gradients(make_head(), *rows_of(5, 1)), per_rank[2]])


def test_nan_of_one_rank_stays_with_it() -> None:
    def work(rank: Thread) -> tuple[Tensor, Tensor]:
        hidden_NH, labels_N = rows_of(5, rank.rank)
        if rank.rank == 1:
            hidden_NH[2] = torch.nan
        return gradients(block("plain", rank), hidden_NH, labels_N)

    per_rank, _ = on_all_ranks(RANKS, work)
    assert per_rank[1][0].isnan().tolist() == [False, False, True, False, False]
    for rank in (0, 2):
        wanted_N, wanted_NH = gradients(make_head(), *rows_of(5, rank))
        torch.testing.assert_close(per_rank[rank][0], wanted_N, rtol=2e-6, atol=4e-6)
        torch.testing.assert_close(per_rank[rank][1], wanted_NH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "biased", "int8"])
@pytest.mark.parametrize("shape", [(2, 1), (3,), (300,)], ids=["decode", "few", "many"])
@pytest.mark.parametrize("vocab_size", [V, 2 * RANKS - 2])
def test_logits(kind: str, shape: tuple[int, ...], vocab_size: int) -> None:
    """Also for a vocabulary so small that the last rank's block is empty."""

    def inputs(rank: int) -> Tensor:
        draw = torch.Generator().manual_seed(rank)
        return torch.randn(*shape, H, generator=draw)[: 3 - rank]  # fewer on each rank

    @torch.no_grad()
    def work(rank: Thread) -> Tensor:
        logits: Tensor = block(kind, rank, vocab_size)(inputs(rank.rank))
        return logits

    per_rank, _ = on_all_ranks(RANKS, work)
    alone = make_head(vocab_size, **KINDS[kind])
    for rank, logits in enumerate(per_rank):
        torch.testing.assert_close(logits, alone(inputs(rank)), rtol=1e-5, atol=1e-5)


def test_logits_with_a_gradient_gather_the_table() -> None:
    def work(rank: Thread) -> Tensor:
        x = torch.ones(2, H, requires_grad=True)
        (block("plain", rank)(x) * torch.arange(V)).sum().backward()
        assert x.grad is not None
        return x.grad

    per_rank, _ = on_all_ranks(RANKS, work)
    x = torch.ones(2, H, requires_grad=True)
    (make_head()(x) * torch.arange(V)).sum().backward()
    assert x.grad is not None
    for grad in per_rank:
        torch.testing.assert_close(grad, x.grad, rtol=1e-5, atol=1e-3)
