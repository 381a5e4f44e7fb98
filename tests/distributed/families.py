"""Rank program: every family, sharded by ZeRO-3 and packed, against plain transformers.

python -m tests.distributed.families OUT.json FOLDER QUANTIZATION CHECKPOINTING
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.base_digest import base_digest
from tests.distributed.sharded_base import run_config, shard_base
from tests.family_bases import (
    CASES,
    errors,
    plain_model,
    problem,
    row_by_row,
    save_family,
    with_virtual_tokens,
)
from tests.soft_prompts import soft_prompts
from tests.unit.test_scoring import BEGINNING, EOS, TARGETS, rows
from trainer.distributed.deepspeed_engine import Engine
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.packing.activation_memory import TokenBudget
from trainer.runtime.process import flush_and_exit
from trainer.training.step import step_gradients

#: Families whose candidates are scored too: full attention, windows, slopes, sinks, padded rows.
SCORED = ("llama", "mistral", "bloom", "gpt_oss", "mpt")


def main() -> None:
    out, root, quantization, checkpointing = sys.argv[1:]
    cases = list(CASES)
    # Before the ranks know each other: transformers lets only the first of them save.
    for case in cases[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]:
        save_family(Path(root) / case, case)
    engine = Engine(120)
    engine.any_rank(False)  # all folders are written
    results = {
        case: train_step(engine, Path(root) / case, quantization, checkpointing == "yes")
        for case in cases
    }
    mine = {
        case: compare(Path(root) / case, quantization, *results[case])
        for case in cases[engine.rank :: engine.world_size]
    }
    merged = {case: result for part in engine.all_gather(mine) for case, result in part.items()}
    if engine.is_main:
        Path(out).write_text(json.dumps(merged))
    engine.close()


def train_step(
    engine: Engine, folder: Path, quantization: str, checkpointing: bool
) -> tuple[list[float], list[Any], dict[str, Any]]:
    """Compare one step over all ranks, and report how the base is stored."""
    config = run_config(str(folder), quantization)
    loaded = shard_base(engine, config, checkpointing=checkpointing, keep_small=False)
    base = loaded.model
    module = engine.attach(base, loaded.policy)
    digest = base_digest(base)
    packed_rows, tensors = problem(base.hidden_size)
    prompts = soft_prompts(tensors)
    step = step_gradients(engine, module, packed_rows, prompts, max_tokens=10_000)
    nll = score(engine, module, prompts) if folder.name in SCORED else []
    matrices = [p for p in base.parameters() if p.ds_numel > 100]
    stored = {
        "nll": nll,
        "digest_kept": base_digest(base) == digest,
        "whole": [list(p.ds_shape) for p in matrices if 2 * p.ds_tensor.numel() > p.ds_numel + 4],
        "float_stacks": [
            list(p.ds_shape)
            for p in matrices
            if len(p.ds_shape) == 3 and p.ds_shape[1] > 1 and p.dtype != torch.int8
        ],
    }
    return step.losses, step.gradients, stored


class Candidates(list[Any]):
    width = len(TARGETS)


def score(engine: Engine, module: Any, prompts: list[Any]) -> list[Any]:
    """Negative log-likelihood of candidates with the first prompt and without one, [2, R, C]."""
    candidates_of_rows = SimpleNamespace(
        task=SimpleNamespace(metric="loss", scored_by_likelihood=False),
        candidates=Candidates(rows(TARGETS, (EOS,))),
        gold=[0] * len(rows(TARGETS)),
        label_counts=[2] * len(rows(TARGETS)),
        num_shared=len(BEGINNING),
    )
    requests: Any = [Request(candidates_of_rows, 0), Request(candidates_of_rows, None)]  # type: ignore[arg-type]
    evaluator = Evaluator(engine, module, None, TokenBudget(40))  # type: ignore[arg-type]
    scored = evaluator.score(requests, prompts)
    return [one.nll_RC.tolist() for one in scored if one.nll_RC is not None]


def plain_likelihoods(model: Any, prompts: list[Any]) -> list[Any]:
    """Negative log-likelihood from transformers, one candidate at a time."""

    def nll(front: Tensor, example: Any) -> float:
        ids = torch.tensor(example.input_ids)
        inputs = with_virtual_tokens(model, ids, front)
        logits = model(**inputs, use_cache=False).logits[0, len(front) :]
        start = example.target_start
        return float(cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum"))

    with torch.no_grad():
        return [
            [[nll(front, example) for example in row] for row in rows(TARGETS, (EOS,))]
            for front in (prompts[0], prompts[0][:0])
        ]


def compare(
    folder: Path, quantization: str, losses: list[float], gradients: list[Any], stored: Any
) -> dict[str, Any]:
    model = plain_model(folder, quantization)
    packed_rows, prompts = problem(model.get_input_embeddings().embedding_dim)
    expected, wanted = row_by_row(model, packed_rows, prompts)
    if stored["nll"]:
        expected_nll = plain_likelihoods(model, prompts)
        apart = torch.tensor(stored.pop("nll")) - torch.tensor(expected_nll)
        stored["nll_error"] = float(apart.abs().max())
    loss_errors = [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]
    return {
        "loss_error": max(loss_errors),
        "gradient_error": max(errors(gradients, wanted)),
        **stored,
    }


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
