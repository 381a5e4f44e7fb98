"""Rank program: every family, sharded by ZeRO-3 and packed, against plain transformers.

python -m tests.distributed.families OUT.json FOLDER QUANTIZATION CHECKPOINTING
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed.sharded_base import run_config, shard_base
from tests.family_bases import CASES, errors, plain_model, problem, row_by_row, save_family
from trainer.engine import Engine, base_digest
from trainer.objective import step_gradients
from trainer.process import leave


def main() -> None:
    out, root, quantization, checkpointing = sys.argv[1:]
    cases = list(CASES)
    # Before the ranks know each other: transformers lets only the first of them save.
    for case in cases[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]:
        save_family(Path(root) / case, case)
    engine = Engine(120)
    engine.any(False)  # all folders are written
    found = {
        case: train_step(engine, Path(root) / case, quantization, checkpointing == "yes")
        for case in cases
    }
    mine = {
        case: compare(Path(root) / case, quantization, *found[case])
        for case in cases[engine.rank :: engine.world_size]
    }
    merged = {case: result for part in engine.all_gather(mine) for case, result in part.items()}
    if engine.is_main:
        Path(out).write_text(json.dumps(merged))
    engine.close()


def train_step(
    engine: Engine, folder: Path, quantization: str, checkpointing: bool
) -> tuple[list[float], list[Any], dict[str, Any]]:
    """Losses and gradients of one step over all ranks, and how the base is stored."""
    config = run_config(str(folder), quantization)
    loaded = shard_base(engine, config, checkpointing=checkpointing, keep_small=False)
    base = loaded.model
    module = engine.attach(base, loaded.policy)
    digest = base_digest(base)
    pieces, prompts = problem(base.hidden_size)
    step = step_gradients(engine, module, pieces, prompts, max_tokens=10_000)
    matrices = [p for p in base.parameters() if p.ds_numel > 100]
    stored = {
        "digest_kept": base_digest(base) == digest,
        "whole": [list(p.ds_shape) for p in matrices if 2 * p.ds_tensor.numel() > p.ds_numel + 4],
        "float_stacks": [
            list(p.ds_shape) for p in matrices if len(p.ds_shape) == 3 and p.dtype != torch.int8
        ],
    }
    return step.losses, step.gradients, stored


def compare(
    folder: Path, quantization: str, losses: list[float], gradients: list[Any], stored: Any
) -> dict[str, Any]:
    model = plain_model(folder, quantization)
    pieces, prompts = problem(model.get_input_embeddings().embedding_dim)
    expected, wanted = row_by_row(model, pieces, prompts)
    loss_errors = [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]
    return {
        "loss_error": max(loss_errors),
        "gradient_error": max(errors(gradients, wanted)),
        **stored,
    }


if __name__ == "__main__":
    main()
    leave(0)  # as the trainer does: threads of libraries abort in a usual end
