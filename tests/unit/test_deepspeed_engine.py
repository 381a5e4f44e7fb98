"""What the engine decides without other ranks; the rest is in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.sharded_base import run_config
from trainer.distributed import deepspeed_engine
from trainer.distributed.collectives import Ranks
from trainer.distributed.deepspeed_engine import Engine, compute_dtype
from trainer.distributed.placement import BaseSize


@pytest.fixture(autouse=True)
def accelerator_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not at the top: without the engine's precaution, DeepSpeed would import mlflow.
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.setattr(deepspeed_engine, "get_accelerator", CUDA_Accelerator)


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


@pytest.mark.parametrize(
    ("cuda", "reason"), [("13.0", "it needs a driver for CUDA 13.0"), (None, "without CUDA")]
)
def test_ranks_do_not_run_on_the_cpu_where_torch_cannot_use_the_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    """As with a driver that is older than the build of torch: nvidia-smi lists the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(RuntimeError, match=f"cannot use the GPUs .*{reason}.*on the CPU"):
        Engine(10)


@pytest.mark.parametrize("visible", ["GPU-8f9e", "MIG-1", "0"])
def test_free_memory_is_that_of_the_device_and_of_the_allocator_s_cache(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    known = {"mem_get_info": (70, 80), "memory_reserved": 5, "memory_allocated": 3}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    engine = Engine.__new__(Engine)  # without connecting ranks
    engine.device, engine.local_rank = torch.device("cuda", 0), 0
    assert engine._free_memory() == 72


def test_gathered_layers_are_not_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is reserved beside that of activations, and does not grow with tokens."""
    config = run_config("base", "int8")
    sizes = BaseSize(total_bytes=700, layer_bytes=100, layer_elements=70)
    monkeypatch.setattr(deepspeed_engine, "base_size", lambda model, dtype: sizes)
    accelerator: Any = SimpleNamespace(
        memory_allocated=lambda device: 350,
        max_memory_allocated=lambda device: 1500,
        reset_peak_memory_stats=lambda device: None,
    )
    monkeypatch.setattr(deepspeed_engine, "get_accelerator", lambda: accelerator)
    engine = Engine.__new__(Engine)
    Ranks.__init__(engine, 0, 2, 0, torch.device("cuda", 0), 60)
    monkeypatch.setattr(engine, "_free_memory", lambda: 3000)
    monkeypatch.setattr(engine, "all_gather", lambda value: [value, value])
    engine.kept_bytes = engine._peak = engine._resident = engine._live_bytes = 0
    for group_size, gathered in ((2, 2 * 70), (1, 0)):
        setting = config.engine.model_copy(update={"shard_group": group_size})
        placed = config.model_copy(update={"engine": setting})
        engine.place(torch.nn.Module(), placed, torch.bfloat16)
        engine.reset_peak_memory()
        assert engine.peak_activation_bytes() == 1500 - 350 - gathered


def test_values_of_one_rank_are_not_sent() -> None:
    """On a GPU each would be copied there and back, several times for every generated token."""
    ranks = Ranks(0, 1, 0, torch.device("cuda", 0), 60)  # torch.distributed is not initialized
    assert ranks.all_gather("value") == ["value"]
    assert ranks.broadcast("value") == "value"
    assert ranks.run_on_main(lambda: 7) == 7
