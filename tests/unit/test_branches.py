"""Rows with branches: packed with their common beginning once, they equal separate rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import CASES, VOCAB_SIZE, errors
from tests.packed_step import pasts
from tests.soft_prompts import soft_prompts
from tests.unit.test_prefix_tuning import packed as packed_prefixes
from trainer.data.token_table import Example
from trainer.model.families import FAMILIES
from trainer.packing.packed_batch import Segment, build_packed_batch
from trainer.packing.packed_row import PackedRow

#: Trunk of 9 tokens; branches after 5, 5 and 0 of them, and one after the whole trunk.
TREE = Example(
    tuple(range(10, 10 + 9 + 3 + 2 + 4 + 2)),
    ((3, 5), (7, 9), (9, 12), (13, 14), (16, 18), (18, 19)),
    0,
    branches=((9, 5), (12, 5), (14, 0), (18, 9)),
)


def test_every_text_of_a_row_and_each_label_once():
    texts = TREE.linear()
    assert [(text.input_ids, text.label_spans) for text in texts] == [
        ((*range(10, 15), 19, 20, 21), ((3, 8),)),
        ((*range(10, 15), 22, 23), ((6, 7),)),
        ((24, 25, 26, 27), ((2, 4),)),
        ((*range(10, 19), 28, 29), ((7, 10),)),
        (tuple(range(10, 19)), ()),
    ]
    assert sum(text.num_labels for text in texts) == TREE.num_labels
    assert TREE.last_target == (7, 9)
    plain = replace(TREE, branches=())
    assert plain.linear() == [plain]


def test_prefix_tuning_of_rows_with_branches(family: Any) -> None:
    base = load_unsharded(family("llama"), "none")
    values = pasts(base)
    row = replace(TREE, input_ids=tuple(i + 20 for i in TREE.input_ids))
    texts = [text for text in row.linear() if text.label_spans]
    losses, gradients = packed([row], base, values)
    expected, wanted = packed(texts, base, values)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert max(errors(gradients, wanted)) < 1e-5


def packed(rows: list[Example], base: Any, values: list[Any]) -> tuple[list[float], list[Any]]:
    """Mean loss of each prefix and its gradient."""
    return packed_prefixes(base, [PackedRow(row, k, 0) for row in rows for k in (0, 1)], values)


def test_segments_of_a_row_with_branches():
    batch = build_packed_batch([PackedRow(TREE, 0, 4)], [3])
    prompt = Segment(0, 3)
    first = Segment(3, 5, prompt)
    second = Segment(8, 4, first)
    branches = [Segment(12, 3, first), Segment(15, 2, first), Segment(17, 4, prompt)]
    assert batch.segments == (prompt, first, second, *branches, Segment(21, 2, second))
    assert batch.token_ids_T.tolist() == [0, 0, 0, *TREE.input_ids]
    assert batch.position_ids_T[12:].tolist() == [8, 9, 10, 8, 9, 3, 4, 5, 6, 12, 13]
    labels = [13, 14, 17, 18, 19, 20, 21, 23, 26, 27, 28]
    assert batch.labels_N.tolist() == labels
    before = [5, 6, 9, 10, 7, 12, 13, 15, 18, 19, 11]
    assert batch.label_positions_N.tolist() == before
    assert batch.label_slot_N.tolist() == [4] * len(labels)
    scored = build_packed_batch([PackedRow(TREE, 0, 4, candidates=(TREE,))], [3])
    assert scored.segments == batch.segments
    assert scored.place_N is not None
    assert scored.distinct_U[scored.place_N].tolist() == before


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt_oss", "mpt"])
def test_losses_and_gradients_are_those_of_separate_rows(
    family: Any, monkeypatch: pytest.MonkeyPatch, case: str, packed: bool
) -> None:
    if not packed:
        known = FAMILIES[model_type := CASES[case][0]]
        monkeypatch.setitem(FAMILIES, model_type, replace(known, packed=False))
    base = load_unsharded(family(case), "none")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (TREE.num_tokens,), generator=draw).tolist()
    tree = replace(TREE, input_ids=tuple(ids))
    other = Example.with_target(tuple(ids[:6]), 3, 1)
    results = []
    for rows in ([tree, other], [*(t for t in tree.linear() if t.label_spans), other]):
        leaves = [torch.randn(p, base.hidden_size, generator=draw.manual_seed(p)) for p in (3, 4)]
        leaves = [(0.3 * leaf).requires_grad_() for leaf in leaves]
        packed_rows = [PackedRow(row, k, i) for i, row in enumerate(rows) for k in (0, 1)]
        batch = build_packed_batch(packed_rows, [3, 4])
        nll_N = base(batch, soft_prompts(leaves)).losses.loss_N
        nll_N.sum().backward()
        in_order = sorted(
            zip(batch.label_prompt_N.tolist(), batch.labels_N.tolist(), nll_N.tolist(), strict=True)
        )
        results.append((in_order, [leaf.grad for leaf in leaves if leaf.grad is not None]))
    (losses, gradients), (expected, wanted) = results
    assert [nll for *_, nll in losses] == pytest.approx([nll for *_, nll in expected], rel=1e-5)
    assert max(errors(gradients, wanted)) < 1e-5
