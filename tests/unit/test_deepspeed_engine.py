"""What the engine decides without other ranks; the rest is in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from trainer.distributed.deepspeed_engine import compute_dtype


def test_bf16_is_chosen_where_the_gpu_supports_it_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    for real, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, real=real: real or including_emulation,
        )
        assert compute_dtype("auto", torch.device("cuda")) == expected
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
