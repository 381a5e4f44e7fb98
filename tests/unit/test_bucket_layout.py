"""Layers of a model on a GPU share one bias of attention, which its kernels take as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.packed_attention import HEADS, SCORES, SEGMENTS, SIZE, TOKENS, tensors, without_past
from trainer.model.attention import bucketed
from trainer.model.attention.bucket_layout import BIAS_ALIGNMENT, make_buckets
from trainer.model.attention.bucketed import attend_in_buckets
from trainer.model.attention.interface import attend, make_layout, with_past
from trainer.packing.packed_batch import map_tensors

#: In place of a GPU: tensors without values, which are not on the CPU.
META = torch.device("meta")


@pytest.mark.parametrize("kind", ["plain", "window", "alibi"])
def test_layers_share_an_aligned_bias(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """torch would make it in every layer, and keep it for backward."""
    given: list[Tensor] = []

    def note(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: Any) -> Tensor:
        given.append(attn_mask)
        return query

    monkeypatch.setattr(bucketed, "scaled_dot_product_attention", note)
    buckets = make_buckets([without_past(segment) for segment in SEGMENTS])
    buckets = map_tensors(buckets, lambda tensor: tensor.to(META))
    x_TAD = torch.empty(TOKENS, HEADS, SIZE, device=META, dtype=torch.bfloat16)
    for _ in range(2):
        attend_in_buckets(x_TAD, x_TAD, x_TAD, buckets, SCORES[kind])
    first, second = given[: len(buckets.each)], given[len(buckets.each) :]
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert any(bias.shape[-1] % BIAS_ALIGNMENT for bias in first)
    for bias in first:
        assert bias.dtype == torch.bfloat16
        assert bias.stride(-1) == 1
        assert all(stride % BIAS_ALIGNMENT == 0 for stride in bias.stride()[:-1])


#: The last token of a prompt, tokens of rows of different buckets, two of a sibling.
READ = torch.tensor([4, 12, 14, 20, 90, 196, 198, 199, 216])


@pytest.mark.parametrize("kind", SCORES)
def test_the_last_layer_attends_from_read_positions(kind: str) -> None:
    """Outputs that are read, and gradients of those, are what attending from all gives."""
    layout = replace(make_layout(SEGMENTS, torch.device("cpu"), READ), last_layer=1)
    assert layout.last is not None
    assert sum(bucket.query_SQ.numel() for bucket in layout.last.buckets.each) < 3 * len(READ)
    results = []
    for layer in (0, 1):  # the same leaves in both
        query, key, value, *past = leaves = tensors(2)
        both = with_past(layout, [torch.cat([x, x], dim=1) for x in past])
        output = attend(query, key, value, both, SCORES[kind], layer)
        assert bool(output[0, 5:12].any()) is (layer == 0), "other layers attend from all"
        read = output[0, READ]
        upstream = torch.randn(read.shape, generator=torch.Generator().manual_seed(1))
        results.append([read, *torch.autograd.grad(read, leaves, upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
