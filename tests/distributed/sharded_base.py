"""Load the base for rank programs: quantized and sharded in fp32, not yet attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import RunConfig
from trainer.distributed.deepspeed_config import resolve_policy
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.placement import Placement
from trainer.distributed.zero3_sharder import expected_base_bytes
from trainer.model.checkpoint_files import open_base
from trainer.model.meta_model import build_meta_model
from trainer.model.prompted_model import PromptedBase
from trainer.model.shard_loading import LoadStats, load_shards


@dataclass(frozen=True)
class ShardedBase:
    """Arguments of ``Engine.attach``, and loading statistics.

    Attributes:
        placement: None if not requested: sharded over all ranks, nothing kept.
        expected_bytes: bytes of the base per rank, computed before loading.
    """

    model: PromptedBase
    policy: dict[str, Any]
    stats: LoadStats
    placement: Placement | None
    expected_bytes: int


def run_config(
    folder: str, quantization: str, num_prompts: int = 1, **engine_settings: Any
) -> RunConfig:
    """Return a run configuration in which only the base and the engine matter."""
    return RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": folder, "quantization": quantization},
            "engine": engine_settings,
            "tasks": [{"name": "t", "train": "-", "input": "{a}", "target": "{b}"}],
            "prompts": [{"name": f"p{i}", "task": "t"} for i in range(num_prompts)],
            "training": {"steps": 1},
        }
    )


def shard_base(
    engine: Engine,
    config: RunConfig,
    *,
    checkpointing: bool = False,
    placed: bool = False,
    keep_small: bool = True,
    share_memory: bool = False,
) -> ShardedBase:
    """Load a base in fp32.

    Args:
        placed: place it as the run file's engine settings request.
        keep_small: keep vectors unsharded on every rank, as a run does.
        share_memory: as in ``Engine.sharder``.
    """
    files = open_base(config.base)
    skeleton = build_meta_model(files, config.base, torch.float32, engine.device)
    placement = engine.place(skeleton, config, torch.float32) if placed else None
    hidden_size = files.config.hidden_size if keep_small else 0
    policy = resolve_policy(config, torch.float32, hidden_size, placement)
    group_size = placement.group_size if placement else engine.world_size
    expected_bytes = expected_base_bytes(skeleton, torch.float32, group_size)
    model, stats = load_shards(
        skeleton,
        files,
        dtype=torch.float32,
        device=engine.device,
        sharder=engine.sharder(policy, group_size, share_memory=share_memory),
        checkpointing=checkpointing,
    )
    return ShardedBase(model, policy, stats, placement, expected_bytes)
