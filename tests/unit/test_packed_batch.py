"""Plans of a step: as few packed batches as there must be, full ones, alike on all ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sampler import TokenBudgetSampler
from trainer.data.token_table import Example
from trainer.packing.packed_batch import Segment, build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.packing.planning import SLACK, plan_batches, windows

P = 20


def rows_of(lengths: list[int], prompts: list[int | None]) -> list[PackedRow]:
    examples = [Example.with_target((1,) * n, 0, i) for i, n in enumerate(lengths)]
    return [PackedRow(e, prompts[i % len(prompts)], i) for i, e in enumerate(examples)]


def tokens(batch: list[PackedRow], lengths: list[int]) -> int:
    prompts = {packed_row.prompt for packed_row in batch if packed_row.prompt is not None}
    return sum(packed_row.example.num_tokens for packed_row in batch) + sum(
        lengths[k] for k in prompts
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80),
    st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 300),
)
def test_no_row_is_lost_and_ranks_are_in_step(lengths, prompts, num_ranks, budget):
    packed_rows, virtual = rows_of(lengths, prompts), [7, 0, 3]
    plan = plan_batches(packed_rows, virtual, num_ranks, budget)
    assert len({len(batches) for batches in plan}) == 1
    assert len(plan) == num_ranks
    real = [p.slot for batches in plan for s in batches for p in s if not p.is_padding]
    assert sorted(real) == list(range(len(packed_rows)))
    for batches in plan:
        for batch in batches:
            assert len(batch) == 1 or tokens(batch, virtual) <= budget * (1 + SLACK)
            assert len(batch) == 1 or not any(packed_row.is_padding for packed_row in batch)
    padding_rows = [p for batches in plan for s in batches for p in s if p.is_padding]
    assert len(padding_rows) < num_ranks
    assert plan == plan_batches(packed_rows, virtual, num_ranks, budget)


@pytest.mark.parametrize(("lengths", "batches"), [([512] * 8, 8), ([512] + [8] * 7, 2)])
def test_a_row_over_the_budget_takes_one_packed_batch(lengths, batches):
    (plan,) = plan_batches(rows_of(lengths, [0]), [P], 1, 90)
    assert len(plan) == batches


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("tokens_per_step", "per_rank"), [(8192, 1), (16384, 1), (16384, 2)])
def test_batches_are_as_few_and_as_full_as_the_budget_allows(num_ranks, tokens_per_step, per_rank):
    """Lengths as real ones are; the step is a multiple of the budget, as people write it."""
    draw = np.random.default_rng(0).lognormal(np.log(60), 0.8, 4000)
    lengths = draw.clip(4, 512).astype(np.int32)
    cursor = TokenBudgetSampler(lengths, tokens_per_step, 0)
    budget = tokens_per_step // (num_ranks * per_rank)
    for _ in range(8):
        packed_rows = rows_of(lengths[cursor.next_rows()].tolist(), [0])
        plan = plan_batches(packed_rows, [P], num_ranks, budget)
        load = np.array([[tokens(s, [P]) for s in batches] for batches in plan])
        assert load.shape == (num_ranks, per_rank)
        assert load.sum() >= 0.995 * budget * load.size
        assert (load.max(0) / load.mean(0)).max() < 1.02


@pytest.mark.fault("ranks with unequal numbers of rows, or none")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_rank_count_reads_each_row_of_an_epoch_once(num_ranks):
    draw = np.random.default_rng(1).lognormal(np.log(60), 0.8, 700)
    lengths = draw.clip(4, 512).astype(np.int32)
    examples = [Example.with_target((1,) * int(n), 0, i) for i, n in enumerate(lengths)]
    cursor, read, steps = TokenBudgetSampler(lengths, 2048, 3), Counter[int](), []
    while cursor.epoch == 0:
        rows = cursor.next_rows()
        steps.append(rows)
        packed_rows = [PackedRow(examples[row], 0, i) for i, row in enumerate(rows)]
        plan = plan_batches(packed_rows, [P], num_ranks, 512)
        packed = [p.example.row for s in plan for batch in s for p in batch if not p.is_padding]
        assert sorted(packed) == sorted(rows)
        read.update(packed)
    late = Counter(steps[-1][len(steps[-1]) - cursor.position :])
    assert read - late == Counter(range(700))


def test_candidates_share_the_tokens_of_their_row():
    """The last token of each predicts nothing; a choice of one token needs no segment."""
    row = [Example.with_target((10, 11, *target), 2, 0) for target in ((7,), (8, 9, 5), (8, 6))]
    packed_row = PackedRow(row[0], 0, 4, candidates=tuple(row))
    assert packed_row.tree.token_ids == (10, 11, 8, 9, 8)
    assert packed_row.num_tokens == 5
    batch = build_packed_batch([packed_row], [3])
    prompt = Segment(0, 3)
    text = Segment(3, 2, prompt)
    own = [Segment(5, 2, text, sibling=True), Segment(7, 1, text, sibling=True)]
    assert batch.segments == (prompt, text, *own)
    assert batch.token_ids_T.tolist() == [0, 0, 0, 10, 11, 8, 9, 8]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 5]
    assert batch.labels_N.tolist() == [7, 8, 9, 5, 8, 6]
    assert batch.label_positions_N.tolist() == [4, 4, 5, 6, 4, 7]
    assert batch.label_slot_N.tolist() == [4, 5, 5, 5, 6, 6]
    assert batch.distinct_U.tolist() == [4, 5, 6, 7]
    assert batch.place_N.tolist() == [0, 0, 1, 2, 0, 3]


@pytest.mark.parametrize(("prompt", "virtual"), [(None, 0), (0, P)])
def test_text_that_all_rows_begin_with_is_read_once(prompt: int | None, virtual: int) -> None:
    rows = [Example.with_target((10, 11, 12 + n, 7), 3, n) for n in range(3)]
    packed_rows = [PackedRow(row, prompt, n, shared=2) for n, row in enumerate(rows)]
    batch = build_packed_batch(packed_rows, [P])
    first = Segment(0, virtual + 2)
    assert batch.segments == (first, *(Segment(virtual + 2 + 2 * n, 2, first) for n in range(3)))
    assert batch.token_ids_T[virtual:].tolist() == [10, 11, 12, 7, 13, 7, 14, 7]
    assert batch.label_positions_N.tolist() == [virtual + 2, virtual + 4, virtual + 6]
    (plan,) = plan_batches(packed_rows, [P], 1, len(batch.token_ids_T))
    assert [len(planned) for planned in plan] == [3]


def test_prompts_that_would_crowd_a_packed_batch_are_planned_apart():
    row = Example.with_target((1,) * 10, 8, 0)
    rows = [PackedRow(row, k, 0) for k in range(5) for _ in range(3)]
    listed = windows(rows, [10, 10, 90, 10, 10], 160, 64)
    assert [{row.prompt for row in rows} for rows in listed] == [{0, 1}, {2}, {3, 4}]
    by_tokens = windows(rows[:3], [10], 160, 1), windows([PackedRow(row, None, 0)] * 20, [], 50, 2)
    assert [[len(rows) for rows in listed] for listed in by_tokens] == [[3], [10, 10]]


def test_a_plan_counts_the_tokens_that_candidates_take():
    """Rows of 30 tokens with 3 choices of one token and EOS: 33 tokens each, not 96."""
    rows = [
        [Example.with_target((1,) * 30 + (2 + i, 9), 30, n) for i in range(3)] for n in range(10)
    ]
    packed_rows = [PackedRow(row[0], 0, 3 * n, candidates=tuple(row)) for n, row in enumerate(rows)]
    (plan,) = plan_batches(packed_rows, [P], 1, 10 * 33 + P)
    assert [len(batch) for batch in plan] == [10]
    assert len(build_packed_batch(plan[0], [P]).token_ids_T) == 10 * 33 + P
    two = plan_batches(packed_rows[:1], [P], 2, 100)
    (padding_row,) = two[1][0]
    assert padding_row.is_padding
    assert build_packed_batch([padding_row], [P]).label_slot_N.tolist() == [-1] * 6
