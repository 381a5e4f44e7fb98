"""Useful tokens: tokens of the rows that a packed batch reads, without the prompt's segment."""

from __future__ import annotations

import pytest

from trainer.data.token_table import Example
from trainer.packing.packed_batch import build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.training.step import text_counts


@pytest.mark.parametrize("past", [0, 4])
def test_fixed_text_of_a_prompt_is_not_counted_for_each_row(past):
    """A packed batch consists of prompts with their fixed text, and of useful tokens."""
    front = [Example(tuple(range(3, 3 + n)), ((n - 2, n),), 0) for n in (5, 9)]
    placed = [Example((7, 8, 9, *range(n)), ((n, n + 3),), 0, 1, 3) for n in (4, 6, 11)]
    rows = [PackedRow(example, 0, slot) for slot, example in enumerate(front)]
    rows += [PackedRow(example, 1, slot) for slot, example in enumerate(placed)]
    assert text_counts(rows, 2) == [5 + 9, 4 + 6 + 11]
    lengths, pasts = ([2, 0], [0, past]) if past else ([2, 5], [0, 0])
    batch = build_packed_batch(rows, lengths, pasts)
    segments = sum(lengths) + 3  # virtual tokens, and fixed text once
    assert len(batch.token_ids_T) == segments + sum(text_counts(rows, 2))
