"""The order of rows: a function of the seed alone, saved and resumed anywhere."""

from __future__ import annotations

import json

import pytest

from trainer.errors import BadInput
from trainer.tasks.cursor import Cursor

LENGTHS = [3, 5, 2, 8, 4, 6, 1]
GOLDEN = [[2, 4, 5, 1, 0, 3], [0, 1, 2, 4, 3, 5]]


def take(cursor: Cursor, steps: int) -> list[list[int]]:
    return [cursor.next_rows() for _ in range(steps)]


def test_every_epoch_reads_every_row_once_in_another_order():
    cursor = Cursor([1] * 50, 1, seed=0)
    epochs = [[row for (row,) in take(cursor, 50)] for _ in range(3)]
    assert cursor.epoch == 3
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))


def test_the_order_is_that_of_all_versions():
    """A golden value: a change here breaks the resume of old runs."""
    assert take(Cursor([1] * 6, 6, seed=7), 2) == GOLDEN
    assert take(Cursor([1] * 6, 6, seed=8), 1) != GOLDEN[:1]


def test_a_step_takes_rows_until_the_tokens_are_reached():
    cursor = Cursor(LENGTHS, 10, seed=1)
    for rows in take(cursor, 20):
        tokens = [LENGTHS[row] for row in rows]
        assert sum(tokens) >= 10 > sum(tokens[:-1])


def test_order_does_not_depend_on_tokens_per_step():
    flat = [row for step in take(Cursor(LENGTHS, 1, seed=3), 30) for row in step]
    other = [row for step in take(Cursor(LENGTHS, 9, seed=3), 10) for row in step]
    short = min(len(flat), len(other))
    assert other[:short] == flat[:short]


def test_at_least_one_row_and_on_into_the_next_epoch():
    assert [len(rows) for rows in take(Cursor([100, 100], 1, seed=0), 4)] == [1] * 4
    cursor = Cursor([1, 1, 1], 10, seed=0)
    assert len(cursor.next_rows()) == 10
    assert (cursor.epoch, cursor.position) == (3, 1)


@pytest.mark.parametrize("steps", [0, 1, 5, 13])
def test_resumed_equals_uninterrupted(steps):
    whole = Cursor(LENGTHS, 7, seed=2)
    expected = take(whole, steps + 10)[steps:]
    first = Cursor(LENGTHS, 7, seed=2)
    take(first, steps)
    second = Cursor(LENGTHS, 7, seed=2)
    take(second, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 10) == expected


def test_resume_refuses_another_order():
    state = Cursor(LENGTHS, 7, seed=2).state_dict()
    with pytest.raises(BadInput, match="seed of the training data was 2 and is now 3"):
        Cursor(LENGTHS, 7, seed=3).load_state_dict(state)
    with pytest.raises(BadInput) as caught:
        Cursor([*LENGTHS, 1], 7, seed=2).load_state_dict(state)
    assert "number of rows of the training data was 7 and is now 8" in caught.value.problems[0]
    with pytest.raises(BadInput, match="tokens of the rows"):
        Cursor(LENGTHS[::-1], 7, seed=2).load_state_dict(state)


def test_nothing_to_read():
    for lengths in ([], [1, 0]):
        with pytest.raises(ValueError, match="at least one token"):
            Cursor(lengths, 1, 0)
