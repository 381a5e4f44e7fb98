"""Layers of a model on a GPU share one bias of attention, which its kernels take as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.packed_attention import HEADS, SCORES, SEGMENTS, SIZE, TOKENS, without_past
from trainer.model.attention import bucketed
from trainer.model.attention.bucket_layout import BIAS_ALIGNMENT, make_buckets
from trainer.model.attention.bucketed import attend_in_buckets

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
    buckets = make_buckets([without_past(segment) for segment in SEGMENTS], META)
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
