"""FlexAttention's compiled kernel against the buckets."""

from __future__ import annotations

import pytest
import torch

from tests.packed_attention import SCORES, SIZE, attended, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("kv_heads", "value_size"), [(4, SIZE), (2, SIZE), (4, 2 * SIZE)])
@pytest.mark.parametrize("kind", SCORES)
def test_kernel_equals_buckets(kind: str, kv_heads: int, value_size: int) -> None:
    leaves = tensors(kv_heads, "cuda", value_size)
    output, gradients = attended(True, leaves, SCORES[kind])
    wanted, wanted_gradients = attended(False, leaves, SCORES[kind])
    torch.testing.assert_close(output, wanted, rtol=2e-3, atol=2e-3)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=5e-3, atol=5e-3)
