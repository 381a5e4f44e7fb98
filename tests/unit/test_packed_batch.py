"""Plans of a step: as few streams as there must be, full ones, alike on all ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sampler import TokenBudgetSampler
from trainer.data.tokenization.tokenize import Example
from trainer.packing.packed_batch import PackedRow, Segment, build_stream
from trainer.packing.planning import SLACK, plan_streams

P = 20


def pieces_of(lengths: list[int], prompts: list[int | None]) -> list[PackedRow]:
    examples = [Example.with_target((1,) * n, 0, i) for i, n in enumerate(lengths)]
    return [PackedRow(e, prompts[i % len(prompts)], i) for i, e in enumerate(examples)]


def tokens(stream: list[PackedRow], lengths: list[int]) -> int:
    prompts = {piece.prompt for piece in stream if piece.prompt is not None}
    return sum(piece.example.num_tokens for piece in stream) + sum(lengths[k] for k in prompts)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80),
    st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 300),
)
def test_no_row_is_lost_and_ranks_are_in_step(lengths, prompts, num_ranks, budget):
    pieces, virtual = pieces_of(lengths, prompts), [7, 0, 3]
    plan = plan_streams(pieces, virtual, num_ranks, budget)
    assert len({len(streams) for streams in plan}) == 1
    assert len(plan) == num_ranks
    real = [p.slot for streams in plan for s in streams for p in s if not p.filler]
    assert sorted(real) == list(range(len(pieces)))
    for streams in plan:
        for stream in streams:
            assert len(stream) == 1 or tokens(stream, virtual) <= budget * (1 + SLACK)
            assert len(stream) == 1 or not any(piece.filler for piece in stream)
    fillers = [p for streams in plan for s in streams for p in s if p.filler]
    assert len(fillers) < num_ranks
    assert plan == plan_streams(pieces, virtual, num_ranks, budget)


@pytest.mark.parametrize(("lengths", "streams"), [([512] * 8, 8), ([512] + [8] * 7, 2)])
def test_a_row_over_the_budget_takes_one_stream(lengths, streams):
    (plan,) = plan_streams(pieces_of(lengths, [0]), [P], 1, 90)
    assert len(plan) == streams


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("tokens_per_step", "per_rank"), [(8192, 1), (16384, 1), (16384, 2)])
def test_streams_are_as_few_and_as_full_as_the_budget_says(num_ranks, tokens_per_step, per_rank):
    """Lengths as real ones are; the step is a multiple of the budget, as people write it."""
    draw = np.random.default_rng(0).lognormal(np.log(60), 0.8, 4000)
    lengths = draw.clip(4, 512).astype(np.int32)
    cursor = TokenBudgetSampler(lengths, tokens_per_step, 0)
    budget = tokens_per_step // (num_ranks * per_rank)
    for _ in range(8):
        pieces = pieces_of(lengths[cursor.next_rows()].tolist(), [0])
        plan = plan_streams(pieces, [P], num_ranks, budget)
        load = np.array([[tokens(s, [P]) for s in streams] for streams in plan])
        assert load.shape == (num_ranks, per_rank)
        assert load.sum() >= 0.995 * budget * load.size
        assert (load.max(0) / load.mean(0)).max() < 1.02


@pytest.mark.fault("ranks with unequal numbers of rows, or none")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_no_row_of_an_epoch_is_lost_or_repeated_whatever_the_ranks(num_ranks):
    draw = np.random.default_rng(1).lognormal(np.log(60), 0.8, 700)
    lengths = draw.clip(4, 512).astype(np.int32)
    examples = [Example.with_target((1,) * int(n), 0, i) for i, n in enumerate(lengths)]
    cursor, read, steps = TokenBudgetSampler(lengths, 2048, 3), Counter[int](), []
    while cursor.epoch == 0:
        rows = cursor.next_rows()
        steps.append(rows)
        pieces = [PackedRow(examples[row], 0, i) for i, row in enumerate(rows)]
        plan = plan_streams(pieces, [P], num_ranks, 512)
        packed = [p.example.row for s in plan for stream in s for p in stream if not p.filler]
        assert sorted(packed) == sorted(rows)
        read.update(packed)
    late = Counter(steps[-1][len(steps[-1]) - cursor.position :])
    assert read - late == Counter(range(700))


def test_candidates_share_the_tokens_of_their_row():
    """The last token of each predicts nothing; a choice of one token needs no segment."""
    row = [Example.with_target((10, 11, *target), 2, 0) for target in ((7,), (8, 9, 5), (8, 6))]
    piece = PackedRow(row[0], 0, 4, candidates=tuple(row))
    assert (piece.shared_ids, piece.own_ids) == ((10, 11), ((), (8, 9), (8,)))
    assert piece.num_tokens == 5
    stream = build_stream([piece], [3])
    prompt = Segment(0, 3)
    text = Segment(3, 2, prompt)
    own = [Segment(5, 2, text, candidate=True), Segment(7, 1, text, candidate=True)]
    assert stream.segments == (prompt, text, *own)
    assert stream.token_ids_T.tolist() == [0, 0, 0, 10, 11, 8, 9, 8]
    assert stream.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 5]
    assert stream.labels_N.tolist() == [7, 8, 9, 5, 8, 6]
    assert stream.label_positions_N.tolist() == [4, 4, 5, 6, 4, 7]
    assert stream.label_slot_N.tolist() == [4, 5, 5, 5, 6, 6]
    assert stream.shared.position_U.tolist() == [4, 5, 6, 7]
    assert stream.shared.place_N.tolist() == [0, 0, 1, 2, 0, 3]


def test_a_plan_counts_the_tokens_that_candidates_take():
    """Rows of 30 tokens with 3 choices of one token and EOS: 33 tokens each, not 96."""
    rows = [
        [Example.with_target((1,) * 30 + (2 + i, 9), 30, n) for i in range(3)] for n in range(10)
    ]
    pieces = [PackedRow(row[0], 0, 3 * n, candidates=tuple(row)) for n, row in enumerate(rows)]
    (plan,) = plan_streams(pieces, [P], 1, 10 * 33 + P)
    assert [len(stream) for stream in plan] == [10]
    assert len(build_stream(plan[0], [P]).token_ids_T) == 10 * 33 + P
    two = plan_streams(pieces[:1], [P], 2, 100)
    (filler,) = two[1][0]
    assert filler.filler
    assert build_stream([filler], [P]).label_slot_N.tolist() == [-1] * 6
