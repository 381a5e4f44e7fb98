"""Rank program: the same step under every way to lay the base over four ranks.

python -m tests.distributed.placement OUT.json BASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.equivalence import errors, problem, run_config
from trainer.base.files import open_base
from trainer.base.loading import load_base
from trainer.base.skeleton import build_skeleton
from trainer.engine import Engine, base_bytes, base_digest, resolve_policy
from trainer.errors import BadInput
from trainer.objective import step_gradients

OFFLOAD = "ds_configs/zero3_offload_cpu.json"
#: name: engine's settings, bytes kept (None: what fits)
WAYS: dict[str, tuple[dict[str, Any], int | None]] = {
    "world": ({}, None),
    "pairs": ({"shard_group": 2}, None),
    "copies": ({"shard_group": 1}, None),
    "lean": ({}, 0),
    "offload": ({"deepspeed": OFFLOAD}, 0),
}


def main() -> None:
    out, folder = sys.argv[1:]
    engine = Engine(120)
    found = {name: step(engine, folder, *way) for name, way in WAYS.items()}
    gradients = {name: result.pop("gradients") for name, result in found.items()}
    for name, result in found.items():
        result["gradient_errors"] = errors(gradients[name], gradients["world"])
    try:
        step(engine, folder, {"shard_group": 3}, None)
        refusal = ""
    except BadInput as error:
        refusal = str(error)
    every = engine.all_gather(found)
    if engine.is_main:
        Path(out).write_text(json.dumps({"ranks": every, "refusal": refusal}))
    engine.close()


def step(engine: Engine, folder: str, settings: dict[str, Any], kept: int | None) -> dict[str, Any]:
    config = run_config(folder, "int8")
    config = config.model_copy(update={"engine": config.engine.model_copy(update=settings)})
    files = open_base(config.base)
    skeleton = build_skeleton(files, config.base, torch.float32, engine.device)
    placement = engine.place(skeleton, config, torch.float32)
    policy = resolve_policy(config, torch.float32, 64, placement)
    base, stats = load_base(
        skeleton,
        files,
        dtype=torch.float32,
        device=engine.device,
        shard=engine.sharder(policy, placement.group_size),
        checkpointing=False,
    )
    module = engine.attach(base, policy, placement.kept_bytes if kept is None else kept)
    digest = base_digest(base)
    pieces, prompts = problem()
    gathered = []
    for max_tokens in (10_000, 24, 24):  # 24: several streams a rank
        before = engine.gathered_bytes
        result = step_gradients(engine, module, pieces, prompts, max_tokens=max_tokens)
        gathered.append(engine.gathered_bytes - before)
    group = next(base.parameters()).ds_process_group  # type: ignore[attr-defined]
    return {
        "losses": result.losses,
        "gradients": result.gradients,
        "base_bytes": base_bytes(base),
        "bytes_read": stats.bytes_read,
        "gathered": gathered,
        "group": dist.get_process_group_ranks(group),
        "whole_bytes": sum(p.ds_numel * p.ds_tensor.element_size() for p in base.parameters()),
        "digest_kept": base_digest(base) == digest,
    }


if __name__ == "__main__":
    main()
