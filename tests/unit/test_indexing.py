"""Tokens laid out in buckets and padded rows: what each gets as a gradient."""

from __future__ import annotations

import torch

from trainer.model.attention import interface
from trainer.model.attention.indexing import take


def test_gradients_of_a_shared_token_are_summed_in_fp32() -> None:
    """A bfloat16 sum of ones would stop at 256."""
    x = torch.zeros(3, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    first = torch.zeros(700, 2, dtype=torch.long)
    taken = take(x, [first, torch.tensor([[0, 2]])])
    assert [part.shape for part in taken] == [(700, 2, 2, 4), (1, 2, 2, 4)]
    (gradient,) = torch.autograd.grad([part.sum() for part in taken], x)
    assert gradient.dtype == torch.bfloat16
    assert gradient[:, 0, 0].tolist() == [1400, 0, 1]


def test_gradients_in_double_precision() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 0, 3], [1, 0, 3]])
    assert torch.autograd.gradcheck(lambda x: take(x, [index]), (x,))


def test_attention_is_not_built_for_each_shape() -> None:
    assert interface.PACKED
    assert not torch.backends.cuda.cudnn_sdp_enabled()
