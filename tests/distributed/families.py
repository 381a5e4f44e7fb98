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

from tests.family_bases import CASES, errors, plain_model, problem, row_by_row, save_family
from trainer.base.files import open_base
from trainer.base.loading import load_base
from trainer.base.skeleton import build_skeleton
from trainer.config import RunConfig
from trainer.engine import Engine, base_digest, resolve_policy
from trainer.objective import step_gradients


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
    files = open_base(config.base)
    policy = resolve_policy(config, torch.float32, 0)
    base, _ = load_base(
        build_skeleton(files, config.base, torch.float32, engine.device),
        files,
        dtype=torch.float32,
        device=engine.device,
        shard=engine.sharder(policy),
        checkpointing=checkpointing,
    )
    module = engine.attach(base, policy)
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


def run_config(folder: str, quantization: str) -> RunConfig:
    task = {"name": "t", "train": "-", "input": "{a}", "target": "{b}"}
    return RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": folder, "quantization": quantization},
            "tasks": [task],
            "prompts": [{"name": "p", "task": "t"}],
            "training": {"steps": 1},
        }
    )


if __name__ == "__main__":
    main()
