"""Rank program: the same step under every placement of the base on four ranks.

python -m tests.distributed.placement OUT.json BASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.base_digest import base_digest
from tests.distributed.equivalence import problem
from tests.distributed.sharded_base import run_config, shard_base
from tests.family_bases import errors
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.zero3_sharder import base_bytes, layers_of
from trainer.runtime.errors import BadInput
from trainer.runtime.process import flush_and_exit
from trainer.training.step import step_gradients

OFFLOAD = "ds_configs/zero3_offload_cpu.json"
#: name: engine's settings, bytes kept (None: what fits); "shared" ones use shared memory
WAYS: dict[str, tuple[dict[str, Any], int | None]] = {
    "world": ({}, None),
    "pairs": ({"shard_group": 2}, None),
    "copies": ({"shard_group": 1}, None),
    "lean": ({}, 0),
    "offload": ({"deepspeed": OFFLOAD}, 0),
    "shared": ({}, None),
    "shared pairs": ({"shard_group": 2}, None),
    "shared lean": ({}, 0),
}


def main() -> None:
    out, folder = sys.argv[1:]
    engine = Engine(120)
    results = {
        name: step(engine, folder, *way, share_memory="shared" in name)
        for name, way in WAYS.items()
    }
    gradients = {name: result.pop("gradients") for name, result in results.items()}
    for name, result in results.items():
        result["gradient_errors"] = errors(gradients[name], gradients["world"])
    try:
        step(engine, folder, {"shard_group": 3}, None)
        refusal = ""
    except BadInput as error:
        refusal = str(error)
    every = engine.all_gather(results)
    if engine.is_main:
        Path(out).write_text(json.dumps({"ranks": every, "refusal": refusal}))
    engine.close()


def step(
    engine: Engine,
    folder: str,
    settings: dict[str, Any],
    kept: int | None,
    *,
    share_memory: bool = False,
) -> dict[str, Any]:
    config = run_config(folder, "int8", **settings)
    loaded = shard_base(engine, config, placed=True, share_memory=share_memory)
    base, placement = loaded.model, loaded.placement
    assert placement is not None
    module = engine.attach(base, loaded.policy, placement.kept_bytes if kept is None else kept)
    digest = base_digest(base)
    packed_rows, prompts = problem()
    layers = layers_of(base)
    parameters = [zero for layer in layers for zero in layer.parameters()]
    live: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: live.append(live_elements(parameters)))
    gathered, exchanged = [], []
    for max_tokens in (10_000, 24, 24):  # 24: several packed batches a rank
        before, rows = engine.gathered_bytes, engine.exchanged_bytes
        result = step_gradients(engine, module, packed_rows, prompts, max_tokens=max_tokens)
        exchanged.append(engine.exchanged_bytes - rows)
        gathered.append(engine.gathered_bytes - before - exchanged[-1])
    some: Any = next(base.parameters())
    return {
        "losses": result.losses,
        "gradients": result.gradients,
        "base_bytes": base_bytes(base),
        "expected_bytes": loaded.expected_bytes,
        "bytes_read": loaded.stats.bytes_read,
        "gathered": gathered,
        "exchanged": exchanged,
        "live_layers": max(live) / sum(p.ds_numel for p in layers[0].parameters()),
        "group": dist.get_process_group_ranks(some.ds_process_group),
        "shares_memory": some.shared_shards is not None,
        "layer_bytes": sum(p.ds_numel * p.ds_tensor.element_size() for p in base.parameters()),
        "table_bytes": base.model.get_output_embeddings().table_bytes,
        "digest_kept": base_digest(base) == digest,
    }


def live_elements(parameters: list[Any]) -> int:
    """Elements that are gathered, or being gathered."""
    return sum(p.ds_numel for p in parameters if p.ds_status.name != "NOT_AVAILABLE")


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
