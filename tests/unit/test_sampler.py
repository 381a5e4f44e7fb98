"""The order of rows: a function of the seed alone, saved and resumed anywhere."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.dataset import MixtureComponent
from trainer.data.sampler import WINDOW, EpochPermutation, TokenBudgetSampler, permute
from trainer.runtime.errors import BadInput

LENGTHS = [3, 5, 2, 8, 4, 6, 1]
GOLDEN = [[2, 1, 5, 0, 4, 3], [4, 5, 3, 0, 2, 1]]
GOLDEN_OF_MANY = [2251124, 2352139, 2629969, 1426418, 4042844, 299368]


def take(cursor: TokenBudgetSampler, steps: int) -> list[list[int]]:
    return [cursor.next_rows() for _ in range(steps)]


def test_every_epoch_reads_every_row_once_in_another_order():
    cursor = TokenBudgetSampler([1] * 50, 1, seed=0)
    epochs = [[row for (row,) in take(cursor, 50)] for _ in range(3)]
    assert cursor.epoch == 3
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))


def test_the_order_is_that_of_all_versions():
    """A golden value: a change here breaks the resume of old runs."""
    assert take(TokenBudgetSampler([1] * 6, 6, seed=7), 2) == GOLDEN
    assert take(TokenBudgetSampler([1] * 6, 6, seed=8), 1) != GOLDEN[:1]
    assert permute(np.arange(6), 5_000_000, "7/0").tolist() == GOLDEN_OF_MANY


def log_normal(rows: int, seed: int = 0) -> np.ndarray:
    """Row lengths as real ones are: median 60 tokens, longest 512."""
    draw = np.random.default_rng(seed).lognormal(np.log(60), 0.8, rows)
    return draw.clip(4, 512).astype(np.int32)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(1, 80), st.integers(0, 9)
)
def test_a_step_is_never_over_and_no_row_of_the_epoch_is_lost_or_repeated(lengths, tokens, seed):
    cursor, read = TokenBudgetSampler(lengths, tokens, seed), list[int]()
    while cursor.epoch < 2:
        before = cursor.epoch
        rows = cursor.next_rows()
        assert sum(lengths[row] for row in rows) <= tokens or len(rows) == 1
        read += rows
        if cursor.epoch > before:
            n = cursor.epoch * len(lengths)
            assert Counter(read[:n]) == dict.fromkeys(range(len(lengths)), cursor.epoch)
        assert len(read) == cursor.epoch * len(lengths) + cursor.position
    assert len(read) >= 2 * len(lengths)


def test_steps_use_the_token_budget():
    lengths = log_normal(20_000)
    for tokens in (2048, 8192, 16384):
        steps = take(TokenBudgetSampler(lengths, tokens, seed=0), 60)
        fill = [lengths[rows].sum() / tokens for rows in steps]
        assert max(fill) <= 1
        assert np.mean(fill) > 0.998, "in order alone it would be 0.97 for 2048 tokens"


def test_rows_are_read_close_to_their_permuted_position():
    lengths = log_normal(3000)
    order = EpochPermutation([MixtureComponent(0, 3000)], 5).rows(0, np.arange(3000)).tolist()
    place = {row: i for i, row in enumerate(order)}
    for tokens in (64, 4096):
        cursor, read = TokenBudgetSampler(lengths, tokens, seed=5), 0
        while cursor.epoch == 0:
            for row in cursor.next_rows()[: 3000 - read]:
                assert abs(place[row] - read) <= WINDOW
                read += 1


def test_no_row_waits_for_more_than_one_update():
    lengths = log_normal(2000)
    order = EpochPermutation([MixtureComponent(0, 2000)], 1).rows(0, np.arange(2000)).tolist()
    cursor, read = TokenBudgetSampler(lengths, 1024, seed=1), set[int]()
    for _ in range(50):
        first = next(row for row in order if row not in read)
        rows = cursor.next_rows()
        assert rows[0] == first
        read |= set(rows)


@pytest.mark.parametrize("few_rows", [0, 1024], ids=["swapped", "sorted"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_order_of_few_rows_comes_equally_often(size, few_rows, monkeypatch):
    monkeypatch.setattr("trainer.data.sampler.FEW_ROWS", few_rows)
    orders = Counter(tuple(permute(np.arange(size), size, f"{n}/0")) for n in range(600))
    expected = 600 / np.prod(range(1, size + 1))
    assert len(orders) == np.prod(range(1, size + 1))
    assert all(abs(count - expected) < 5 * expected**0.5 for count in orders.values())


def test_an_order_of_many_rows_is_computed_place_by_place():
    size = 5_000_000
    places = np.arange(size - 4000, size)
    rows = permute(places, size, "0/0")
    assert len(set(rows.tolist())) == len(places)
    assert rows.min() < 0.01 * size < 0.99 * size < rows.max()
    assert permute(places[7:9], size, "0/0").tolist() == rows[7:9].tolist()
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.05


WEIGHTED = [
    MixtureComponent(0, 10, 1.0),
    MixtureComponent(10, 12, 2.0),
    MixtureComponent(12, 60, 1.0),
]


def test_weights_are_exact_in_every_epoch():
    order = EpochPermutation(WEIGHTED, 3)
    epochs = [order.rows(epoch, np.arange(60)).tolist() for epoch in range(4)]
    for rows in epochs:
        assert [sum(s.start <= row < s.stop for row in rows) for s in WEIGHTED] == [15, 30, 15]
    assert len({tuple(rows) for rows in epochs}) == 4
    flat = Counter(row for rows in epochs for row in rows)
    for source in WEIGHTED:  # no row again before all others of its source
        counts = [flat[row] for row in range(source.start, source.stop)]
        assert max(counts) - min(counts) <= 1


def test_weights_in_proportion_to_rows_read_every_row_once():
    sources = [MixtureComponent(0, 20, 0.2), MixtureComponent(20, 100, 0.8)]
    for epoch in range(2):
        assert sorted(EpochPermutation(sources, 0).rows(epoch, np.arange(100)).tolist()) == list(
            range(100)
        )


def test_weighted_rows_resume():
    lengths = log_normal(60)
    uninterrupted = TokenBudgetSampler(lengths, 500, 2, WEIGHTED)
    take(uninterrupted, 9)
    other = TokenBudgetSampler(lengths, 500, 2, WEIGHTED)
    other.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    assert take(other, 20) == take(uninterrupted, 20)
    with pytest.raises(BadInput, match="order of the training data was swap-or-not 64, mixed"):
        TokenBudgetSampler(lengths, 500, 2).load_state_dict(uninterrupted.state_dict())


def test_a_step_reads_at_least_one_row_and_continues_into_the_next_epoch():
    assert [len(rows) for rows in take(TokenBudgetSampler([100, 100], 1, seed=0), 4)] == [1] * 4
    cursor = TokenBudgetSampler([1, 1, 1], 10, seed=0)
    assert len(cursor.next_rows()) == 10
    assert (cursor.epoch, cursor.position) == (3, 1)


@pytest.mark.parametrize("steps", [0, 1, 5, 13])
def test_resumed_equals_uninterrupted(steps):
    uninterrupted = TokenBudgetSampler(LENGTHS, 7, seed=2)
    expected = take(uninterrupted, steps + 10)[steps:]

    first = TokenBudgetSampler(LENGTHS, 7, seed=2)
    take(first, steps)
    second = TokenBudgetSampler(LENGTHS, 7, seed=2)
    take(second, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 10) == expected


def test_resume_refuses_another_order():
    state = TokenBudgetSampler(LENGTHS, 7, seed=2).state_dict()
    with pytest.raises(BadInput, match="seed of the training data was 2 and is now 3"):
        TokenBudgetSampler(LENGTHS, 7, seed=3).load_state_dict(state)
    with pytest.raises(BadInput) as caught:
        TokenBudgetSampler([*LENGTHS, 1], 7, seed=2).load_state_dict(state)
    assert "number of rows of the training data was 7 and is now 8" in caught.value.problems[0]
    with pytest.raises(BadInput, match="tokens of the rows"):
        TokenBudgetSampler(LENGTHS[::-1], 7, seed=2).load_state_dict(state)


def test_an_empty_dataset_gives_no_rows():
    for lengths in ([], [1, 0]):
        with pytest.raises(ValueError, match="at least one token"):
            TokenBudgetSampler(lengths, 1, 0)
