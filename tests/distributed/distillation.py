"""Rank program: distilled prompts against two plain forwards of transformers on the same weights.

python -m tests.distributed.distillation OUT.json BASE QUANTIZATION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from tests.distributed.equivalence import LENGTHS, errors, plain_model, problem
from tests.distributed.sharded_base import run_config, shard_base
from trainer.data.teacher import Teacher
from trainer.data.token_table import Example
from trainer.distributed.deepspeed_engine import Engine
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.process import flush_and_exit
from trainer.training.step import step_gradients

#: Of the second and third prompt; the first learns labels. The first token of a row is "special".
TEACHERS = {
    1: Teacher(0, tuple(range(3, 43)), 1),
    2: Teacher(1, tuple(range(50, 61)), 1),
}


def main() -> None:
    out, folder, quantization = sys.argv[1:]
    engine = Engine(120)
    config = run_config(folder, quantization, num_prompts=len(LENGTHS) + 1)
    loaded = shard_base(engine, config)
    module = engine.attach(loaded.model, loaded.policy)

    packed_rows, prompts = problem()
    packed_rows = [
        PackedRow(p.example, p.prompt, p.slot, teacher=TEACHERS.get(p.prompt)) for p in packed_rows
    ]
    teachers = [
        VirtualTokens(
            module(torch.tensor(teacher.token_ids, device=engine.device), []).embeddings_TH
        )
        for teacher in TEACHERS.values()
    ]
    engine.end_step()

    def step(of: list[PackedRow], max_tokens: int) -> Any:
        return step_gradients(engine, module, of, prompts, max_tokens, teachers)

    ours, split = step(packed_rows, 10_000), step(packed_rows, 48)
    # Two ranks: one row has a teacher, on the other rank none does, or there is a padding row
    # alone.
    apart, alone = step([packed_rows[0], packed_rows[1]], 30), step(packed_rows[1:2], 10_000)

    reference = plain_model(Path(folder), quantization)
    expected = [plain_losses(reference, packed_rows, k, prompts[k].tensor) for k in range(2)]
    wanted_past = plain_past(reference, packed_rows, prompts[2].tensor)
    rows = SimpleNamespace(
        task=SimpleNamespace(metric="loss", scored_by_likelihood=False),
        candidates=Candidates([[p.example] for p in packed_rows if p.prompt == 1]),
        gold=[0] * sum(p.prompt == 1 for p in packed_rows),
        label_counts=[p.example.num_labels for p in packed_rows if p.prompt == 1],
        num_shared=0,
    )
    budget: Any = SimpleNamespace(tokens=60)
    evaluator = Evaluator(engine, module, None, budget, teachers)  # type: ignore[arg-type]
    requests: Any = [Request(rows, 1, TEACHERS[1]), Request(rows, None, TEACHERS[1])]  # type: ignore[arg-type]
    scores = [scored.scores for scored in evaluator.score(requests, prompts)]
    result = {
        "losses": ours.losses,
        "expected_losses": [*(loss for loss, _, _ in expected), wanted_past],
        "gradient_errors": errors(ours.gradients[:2], [gradient for _, gradient, _ in expected]),
        "split_errors": errors(split.gradients, ours.gradients),
        "apart": apart.losses[1],
        "wanted_apart": plain_losses(reference, packed_rows[:2], 1, prompts[1].tensor)[0],
        "alone": alone.losses[1],
        "scores": scores,
        "agreement": expected[1][2],
    }
    if engine.is_main:
        Path(out).write_text(json.dumps(result))
    engine.close()


class Candidates(list[list[Example]]):
    width = 1


def plain_losses(
    model: Any, packed_rows: list[PackedRow], k: int, prompt_PH: Tensor
) -> tuple[float, Tensor, float]:
    """Mean loss, its gradient, and agreement of one prompt, row by row, logits of all positions."""
    leaf = prompt_PH.clone().requires_grad_()
    words = model.get_input_embeddings()
    total, same, count = torch.zeros(()), 0, 0
    for packed_row in (p for p in packed_rows if p.prompt == k):
        row, start = torch.tensor(packed_row.example.input_ids), packed_row.example.target_start
        read = torch.cat([leaf, words(row)])[None]
        student = model(inputs_embeds=read).logits[0, len(leaf) + start - 1 : -1]
        if packed_row.teacher is None:
            total = total + cross_entropy(student, row[start:], reduction="sum")
        else:
            target = plain_teacher(model, packed_row)
            total = total + kl_div(
                student.log_softmax(1), target.log_softmax(1), reduction="sum", log_target=True
            )
            same += int((student.argmax(1) == target.argmax(1)).sum())
        count += len(row) - start
    (gradient,) = torch.autograd.grad(total / count, leaf)
    return float(total) / count, gradient, same / count


@torch.no_grad()
def plain_teacher(model: Any, packed_row: PackedRow) -> Tensor:
    """Logits at a row's labels after its teacher's text, computed as one sequence of token ids."""
    assert packed_row.teacher is not None
    row, start = packed_row.example.input_ids, packed_row.example.target_start
    ids = torch.tensor([[*packed_row.teacher.token_ids, *row[1:]]])
    logits: Tensor = model(input_ids=ids).logits[0, -(len(row) - start) - 1 : -1]
    return logits


@torch.no_grad()
def plain_past(model: Any, packed_rows: list[PackedRow], past: Tensor) -> float:
    """Mean divergence of a prompt of keys and values from its teacher, through a cache."""
    from transformers import DynamicCache

    total, count = 0.0, 0
    for packed_row in (p for p in packed_rows if p.prompt == 2):
        row, start = torch.tensor([packed_row.example.input_ids]), packed_row.example.target_start
        cache = DynamicCache()
        for layer in range(past.shape[1]):
            keys, values = past[:, layer].permute(1, 2, 0, 3)[:, None].unbind(0)
            cache.update(keys, values, layer)
        student = model(input_ids=row, past_key_values=cache).logits[0, start - 1 : -1]
        target = plain_teacher(model, packed_row)
        total += float(
            kl_div(student.log_softmax(1), target.log_softmax(1), reduction="sum", log_target=True)
        )
        count += row.shape[1] - start
    return total / count


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
