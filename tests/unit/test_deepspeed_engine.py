"""What the engine decides without other ranks; the rest is in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.distributed.deepspeed_engine import Engine, compute_dtype


def test_bf16_is_taken_where_it_is_no_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    for real, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, real=real: real or including_emulation,
        )
        assert compute_dtype("auto", torch.device("cuda")) == expected
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_a_rank_tries_again_alone_only_once_training_is_traced() -> None:
    """What DeepSpeed has seen of forwards alone, as of a validation, is no trace of training."""
    released: list[str] = []
    coordinator = SimpleNamespace(
        is_complete_trace=lambda: True,
        reset_step=lambda: None,
        release_backward_leftovers=lambda: None,
        release_and_reset_all=released.append,
    )
    engine: Any = Engine.__new__(Engine)
    engine.world_size, engine._group_size, engine._kept = 2, 1, []
    engine.device = torch.device("cpu")
    engine._zero = SimpleNamespace(get_param_coordinator=lambda: coordinator, module="base")
    engine._traced = False
    assert not engine.recover_from_oom()
    engine.note_trained_batch()
    assert engine.recover_from_oom()
    assert released == ["base"]
    engine._group_size = 2
    assert not engine.recover_from_oom(), "others wait in a gather"
