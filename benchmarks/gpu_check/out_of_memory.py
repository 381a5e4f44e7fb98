"""A step whose packed batch does not fit: it must be split, with the same losses and gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_check.int8_base import make_int8_base
from benchmarks.gpu_check.part import Check
from benchmarks.gpu_check.sizes import VIRTUAL_TOKENS, Sizes
from benchmarks.peers.rows import ANSWER, make_rows
from benchmarks.random_base import VOCAB_SIZE
from launch.launcher_command import free_port
from tests.base_digest import base_digest
from tests.distributed.sharded_base import run_config, shard_base
from tests.soft_prompts import soft_prompts
from trainer.data.token_table import Example
from trainer.distributed.deepspeed_engine import Engine
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.training.step import step_gradients

#: Share of the activations' peak that is left for the step.
LEFT = 0.7
#: Largest difference of the gradient, relative to its largest element. The base is in fp32.
ACCEPTABLE_DIFFERENCE = 1e-3


def out_of_memory(check: Check) -> None:
    """Occupy the card's memory until a step does not fit, and compare with the step before.

    Raises:
        RuntimeError: if the step was not split, or its gradient differs.
    """
    make_int8_base(check.folder / "memory_base", check.sizes.memory_shape)
    os.environ["MASTER_PORT"] = str(free_port())
    engine = Engine(60)
    config = run_config(str(check.folder / "memory_base"), "int8")
    loaded = shard_base(engine, config, placed=True)
    assert loaded.placement is not None
    module = engine.attach(loaded.model, loaded.policy, loaded.placement.kept_bytes)
    rows, prompts = _problem(check.sizes, engine.device)
    digest = base_digest(loaded.model)
    most = 2 * check.sizes.memory_tokens

    def step() -> Any:
        return step_gradients(engine, module, rows, prompts, most)

    step()  # DeepSpeed records the order of layers
    engine.reset_peak_memory()
    expected = step()
    peak = engine.peak_activation_bytes()
    left = int(LEFT * peak) + engine.kept_bytes  # gathered again in every step
    with _scarce(check, loaded.model, left):
        split = step()
    after = step()
    wanted = expected.gradients[0]
    result = {
        "peak_bytes": peak,
        "left_bytes": left,
        "tokens": expected.longest_batch,
        "splits": split.splits,
        "splits_after": after.splits,
        "loss_difference": abs(split.losses[0] / expected.losses[0] - 1),
        "gradient_difference": float(
            (split.gradients[0] - wanted).abs().max() / wanted.abs().max()
        ),
        "base_unchanged": base_digest(loaded.model) == digest,
    }
    check.save(result)
    engine.close()
    if not result["splits"] or result["splits_after"]:
        raise RuntimeError(
            f"{result['splits']} splits, then {result['splits_after']}; not 1 or more, then 0"
        )
    if not (result["gradient_difference"] <= ACCEPTABLE_DIFFERENCE and result["base_unchanged"]):
        raise RuntimeError("the split step has another gradient, or changed the base")


def _problem(sizes: Sizes, device: torch.device) -> tuple[list[PackedRow], list[SoftPrompt]]:
    """Return rows of about ``memory_tokens`` tokens, and one prompt."""
    rows: list[PackedRow] = []
    tokens = 0
    for i, row in enumerate(make_rows(sizes.memory_tokens, VOCAB_SIZE)):
        if tokens >= sizes.memory_tokens:
            break
        start = max(1, len(row.input_ids) - ANSWER)
        rows.append(PackedRow(Example.with_target(tuple(row.input_ids), start, i), 0, i))
        tokens += len(row.input_ids)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(VIRTUAL_TOKENS, sizes.memory_shape["hidden_size"], generator=generator)
    return rows, soft_prompts([prompt.to(device) * 0.1])


@contextmanager
def _scarce(check: Check, base: nn.Module, left: int) -> Iterator[None]:
    """Leave ``left`` bytes of the card; on the CPU, let a layer fail for many tokens."""
    if check.small:
        from tests.scarce_memory import scarce

        with scarce(base, int(LEFT * check.sizes.memory_tokens), backward=False):
            yield
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - left), dtype=torch.uint8, device=check.device)
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()
