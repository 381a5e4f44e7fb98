"""Attention in buckets on a CUDA device: the kernel that runs, and gradients in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from trainer.model.attention.bucket_layout import Scores
from trainer.model.attention.interface import attend, make_layout
from trainer.packing.packed_batch import Segment
from trainer.training.saved_tensors import SavedBytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_bf16 = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)),
    reason="needs a device that computes in bfloat16",
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_with_a_mask(dtype: torch.dtype, size: int) -> None:
    """Neither one that is built for each shape, nor one that keeps all scores."""
    x = torch.randn(3, 4, 50, size, device="cuda", dtype=dtype, requires_grad=True)
    mask = torch.ones(3, 1, 50, 50, device="cuda", dtype=torch.bool).tril()
    chosen = torch._fused_sdp_choice(x, x, x, attn_mask=mask)
    assert chosen == SDPBackend.EFFICIENT_ATTENTION.value


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_save_one_bias(dtype: torch.dtype) -> None:
    """Its rows are not a multiple of what the kernel requires."""
    row = Segment(0, 999)
    layout = make_layout([row], torch.device("cuda"))
    x = torch.randn(1, 1, row.length, 64, device="cuda", dtype=dtype, requires_grad=True)

    def saved(layers: int) -> int:
        counted = SavedBytes()
        with counted:
            outputs = [attend(x, x, x, layout, Scores(0.1), layer) for layer in range(layers)]
        assert outputs[0].isfinite().all()
        return counted.total

    assert saved(3) - saved(1) < row.length**2 * dtype.itemsize


@needs_bf16
def test_gradient_of_a_prompt_that_many_rows_read() -> None:
    """In bfloat16 as in float32: its keys and values get a gradient from each of 600 rows."""
    prompt = Segment(0, 4)
    segments = [prompt, *(Segment(4 + 3 * i, 3, prompt) for i in range(600))]
    layout = make_layout(segments, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [
        torch.randn(1, heads, segments[-1].end, 64, device="cuda", generator=generator)
        for heads in (4, 2, 2)
    ]

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in drawn]
        output = attend(*leaves, layout, Scores(0.1), 0)
        of_leaves = torch.autograd.grad(output.float().sum(), leaves)
        return [x[:, :, : prompt.end].float() for x in of_leaves[1:]]

    of_keys, of_values = zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True)
    for actual, expected in (of_keys, of_values):
        assert float((actual - expected).norm() / expected.norm()) < 0.02
