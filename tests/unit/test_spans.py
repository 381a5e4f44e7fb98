"""Attention over spans on a CPU against the same attention over padded buckets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.packed_attention import SCORES, SEGMENTS, TOKENS, tensors, without_past
from trainer.model.attention import interface
from trainer.model.attention.bucket_layout import Scores
from trainer.model.attention.interface import Layout, attend, make_layout, with_past
from trainer.model.attention.spans import make_spans
from trainer.packing.packed_batch import Segment


def _alone(segment: Segment) -> Segment:
    prefix = None if segment.prefix is None else _alone(segment.prefix)
    return replace(segment, prefix=prefix, sibling=False)


#: Segments with prompts of tokens, with prefixes, with several prefixes, and with none.
ALONE = [_alone(segment) for segment in SEGMENTS]
LONGEST = max(segment.prefix_length + segment.length for segment in ALONE)
CPU = torch.device("cpu")


def attended(spans: bool, leaves: list[Tensor], scores: Scores) -> list[Tensor]:
    """Output, and the gradient of every leaf."""
    query, key, value, *past = leaves
    layout: Layout = with_past(make_layout(ALONE, CPU), past)
    assert layout.spans is not None
    output = attend(
        query, key, value, layout if spans else replace(layout, spans=None), scores, layer=0
    )
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("limit", [None, LONGEST])
def test_spans_equal_buckets(kv_heads: int, limit: int | None) -> None:
    scores = Scores(0.3, window=limit, chunk=limit)
    results = [attended(spans, tensors(kv_heads), scores) for spans in (True, False)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_inputs_are_not_copied_in_backward() -> None:
    """The gradient of an index would be a copy in a tensor of zeros."""
    query, key, value, *_ = tensors(2)
    layout = make_layout([without_past(segment) for segment in ALONE], CPU)
    output = attend(query, key, value, layout, Scores(0.3), layer=0)
    nodes, names = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes += [following for following, _ in node.next_functions]
    assert "SqueezeBackward1" in names
    assert "SelectBackward0" not in names


def test_the_first_layer_has_no_gradient_for_text() -> None:
    learned = 8  # both prompts of tokens
    full, limited = (
        replace(make_layout(ALONE, CPU, None, n), last_layer=1) for n in (None, learned)
    )
    results = []
    for layout in (full, limited):
        query, key, value, *past = leaves = tensors(2)
        output = attend(query, key, value, with_past(layout, past), Scores(0.3), layer=0)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        query_, key_, value_, *past_ = torch.autograd.grad(output, leaves, upstream)
        of_prompts = [x[:, :, :learned] for x in (query_, key_, value_)]
        results.append([output, *of_prompts, *past_])
        unneeded = key_[:, :, learned:]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not unneeded.any()


@pytest.mark.parametrize("num_unread", [1, TOKENS // 2 + 1])
def test_the_last_layer_uses_buckets_if_few_positions_are_read(
    monkeypatch: pytest.MonkeyPatch, num_unread: int
) -> None:
    """Spans are faster than buckets of most of the queries."""
    calls: list[int] = []

    def in_buckets(query_TAD: Tensor, *_: Any) -> Tensor:
        calls.append(len(query_TAD))
        return query_TAD

    monkeypatch.setattr(interface, "attend_in_buckets", in_buckets)
    layout = make_layout(
        [without_past(segment) for segment in ALONE], CPU, torch.arange(num_unread, TOKENS)
    )
    query, key, value = tensors(2)[:3]
    attend(query, key, value, replace(layout, last_layer=1), Scores(0.3), layer=1)
    assert calls == ([] if num_unread == 1 else [TOKENS - num_unread])


def test_values_may_be_narrower_than_keys() -> None:
    layout = make_layout([without_past(segment) for segment in ALONE], CPU)
    query, key, value = tensors(4, value_size=8)
    outputs = [
        attend(query, key, value, each, Scores(0.3), layer=0)
        for each in (layout, replace(layout, spans=None))
    ]
    assert outputs[0].shape[-1] == 8
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "plain"])
def test_other_scores_do_not_suit(name: str) -> None:
    spans = make_spans(ALONE)
    assert spans is not None
    assert spans.suits(SCORES["plain"])
    assert not spans.suits(SCORES[name])
    assert not spans.suits(Scores(0.3, chunk=LONGEST - 1))
    assert not spans.suits(Scores(0.3, sinks_A=torch.zeros(4)))


def test_siblings_are_left_to_buckets() -> None:
    assert make_spans(SEGMENTS) is None


def test_consecutive_rows_read_their_prompt_in_one_call() -> None:
    prompt, other = Segment(0, 4), Segment(4, 3)
    rows = [Segment(7, 5, prompt), Segment(12, 2, prompt), Segment(14, 6, other)]
    after = Segment(20, 3, rows[2])
    spans = make_spans([prompt, other, *rows, after, Segment(23, 1, prompt)])
    assert spans is not None
    assert spans.shared == (
        (Segment(7, 7), prompt),
        (Segment(23, 1), prompt),
        (Segment(14, 9), other),
        (Segment(20, 3), rows[2]),
    )


def test_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base may be one that needs no compiler, on a machine that has none."""
    monkeypatch.setattr(torch, "compile", None)
    prompt, row = Segment(0, 8), Segment(8, 1016, Segment(0, 8))
    layout = make_layout([prompt, row], CPU)
    assert layout.spans is not None
    x_1ATD = torch.randn(1, 8, 1024, 16)  # twice the elements from which loops are compiled
    output = attend(x_1ATD, x_1ATD, x_1ATD, layout, Scores(0.3), layer=0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        x_1ATD, x_1ATD, x_1ATD, is_causal=True, scale=0.3
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_a_diverged_prompt_stays_alone() -> None:
    leaves = tensors(4)
    with torch.no_grad():
        for leaf in leaves[:3]:
            leaf[:, :, :5] = torch.nan  # the first prompt
    output, *gradients = attended(True, leaves, Scores(0.3))
    infected = [s for s in ALONE if any(p.start == 0 for p in (*s.prefixes, s))]
    expected = torch.zeros(TOKENS, dtype=torch.bool)
    for segment in infected:
        expected[segment.start : segment.end] = True
    assert torch.equal(output[0].isnan().flatten(1).any(1), expected)
    for gradient in gradients[:3]:
        assert not gradient[0].isnan().any(-1).any(0)[~expected].any()
