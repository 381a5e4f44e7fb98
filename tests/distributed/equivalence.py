"""Rank program: our sharded, packed base against plain transformers and PEFT on the same weights.

python -m tests.distributed.equivalence OUT.json BASE QUANTIZATION:CHECKPOINTING ...
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tests.base_digest import base_digest
from tests.distributed.sharded_base import run_config, shard_base
from tests.family_bases import errors, padded_loss, plain_model
from tests.soft_prompts import soft_prompts
from trainer.data.token_table import Example
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.zero3_sharder import base_bytes, layers_of
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.quantization import quantize_rows
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt
from trainer.runtime.process import flush_and_exit
from trainer.training.step import StepResult, step_gradients

LENGTHS = [5, 8]  # virtual tokens of the first two prompts
PAST = (4, 3, 2, 2, 16)  # keys and values of the third: P, layers, 2, heads of keys, head size
ROWS = [7, 20, 33, 12, 5, 18, 40, 9]


def main() -> None:
    out, folder, *cases = sys.argv[1:]
    engine = Engine(120)
    results = {case: compare(engine, folder, *case.split(":")) for case in cases}
    if engine.is_main:
        Path(out).write_text(json.dumps(results))
    engine.close()


def compare(engine: Engine, folder: str, quantization: str, checkpointing: str) -> dict[str, Any]:
    """Compare one way to store the base; every rank returns the same result."""
    config = run_config(folder, quantization, num_prompts=len(LENGTHS) + 1)
    loaded = shard_base(engine, config, checkpointing=checkpointing == "yes")
    base = loaded.model
    module = engine.attach(base, loaded.policy)
    digest = base_digest(base)

    packed_rows, prompts = problem()
    ours = step_gradients(engine, module, packed_rows, prompts, max_tokens=10_000)
    split = step_gradients(engine, module, packed_rows, prompts, max_tokens=48)
    alone = step_gradients(engine, module, packed_rows[:1], prompts, max_tokens=10_000)
    # Two ranks: on one all rows read virtual tokens, on the other only keys and values.
    apart = step_gradients(
        engine, module, [packed_rows[6], packed_rows[2]], prompts, max_tokens=10_000
    )
    gathered = engine.gathered_bytes
    with listed_layers(base) as listed:
        step_gradients(engine, module, packed_rows, prompts, max_tokens=10_000)

    poisoned = [type(p)(p.tensor.clone()) for p in prompts]
    if engine.rank == 1:
        poisoned[1].tensor[0, 0] = math.nan
    nan = step_gradients(engine, module, packed_rows, poisoned, max_tokens=10_000)

    reference = plain_model(Path(folder), quantization)
    peft = padded_peft(reference, packed_rows, prompts)
    peft_alone = padded_peft(reference, packed_rows[:1], prompts)
    peft_apart = padded_peft(reference, [packed_rows[6], packed_rows[2]], prompts)
    result: dict[str, Any] = {
        "all_rows": numbers(ours, peft),
        "one_row": numbers(alone, peft_alone),
        "apart": numbers(apart, peft_apart),
        "losses": ours.losses,
        "split_errors": errors(split.gradients, ours.gradients),
        "nan_skipped": nan.skipped,
        "nan_gradients": [g is None for g in nan.gradients],
        "nan_other_loss": nan.losses[0],
        "digest_kept": base_digest(base) == digest,
        "weights_equal": weights_equal(base, Path(folder), quantization),
        "base_bytes": engine.all_gather(base_bytes(base)),
        "full_bytes": full_bytes(reference, quantization),
        "gathered_bytes_per_step": engine.gathered_bytes - gathered,
        "bytes_read": loaded.stats.bytes_read,
        "world_size": engine.world_size,
        "shared_files": engine.all_gather(shared_files()),
        "listed_layers": listed,
        "mlflow_loaded": engine.all_gather("mlflow" in sys.modules),
    }
    every = engine.all_gather(result)
    result["ranks_agree"] = all(
        r["losses"] == result["losses"] and r["nan_skipped"] == result["nan_skipped"] for r in every
    )
    return result


@contextmanager
def listed_layers(base: nn.Module) -> Iterator[list[str]]:
    """Names of the classes of layers whose parameters are listed meanwhile, once per time."""
    layers, listed, original = layers_of(base), list[str](), nn.Module.named_parameters

    def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(module is layer for layer in layers):
            listed.append(type(module).__name__)
        return original(module, *args, **kwargs)

    with patch.object(nn.Module, "named_parameters", named_parameters):
        yield listed


def numbers(ours: StepResult, peft: list[tuple[float, torch.Tensor]]) -> dict[str, Any]:
    """Losses and gradients of the prompts that read rows: ours, and PEFT's."""
    read = [k for k, gradient in enumerate(ours.gradients) if gradient is not None]
    return {
        "losses": [ours.losses[k] for k in read],
        "gradients": [gradient.tolist() for gradient in ours.gradients if gradient is not None],
        "peft_losses": [loss for loss, _ in peft],
        "peft_gradients": [gradient.tolist() for _, gradient in peft],
        "skipped": ours.skipped,
    }


def problem() -> tuple[list[PackedRow], list[SoftPrompt]]:
    """Return rows of several lengths for two prompts of virtual tokens and one prefix, in turn."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        Example.with_target(
            tuple(torch.randint(3, 300, (n,), generator=generator).tolist()), n // 2, i
        )
        for i, n in enumerate(ROWS)
    ]
    prompts = [torch.randn(p, 64, generator=generator) * 0.3 for p in LENGTHS]
    prompts.append(torch.randn(*PAST, generator=generator) * 0.5)
    return [PackedRow(row, i % 3, i) for i, row in enumerate(rows)], soft_prompts(prompts)


def padded_peft(
    model: Any, packed_rows: list[PackedRow], prompts: list[SoftPrompt]
) -> list[tuple[float, torch.Tensor]]:
    """Loss and prompt gradient of PEFT's PeftModel on padded rows, one prompt after the other."""
    expected = []
    for k, prompt in enumerate(prompts):
        rows = [packed_row.example for packed_row in packed_rows if packed_row.prompt == k]
        if not rows:
            continue
        kind = PrefixTuningConfig if isinstance(prompt, PrefixKeyValues) else PromptTuningConfig
        peft = get_peft_model(
            model, kind(task_type="CAUSAL_LM", num_virtual_tokens=prompt.num_virtual_tokens)
        )
        weight = peft.prompt_encoder["default"].embedding.weight
        weight.data.copy_(prompt.tensor.flatten(1))
        loss = padded_loss(peft, rows)
        loss.backward()
        expected.append((loss.item(), weight.grad.view(prompt.tensor.shape).clone()))
        model = peft.get_base_model()
    return expected


def full_parameter(parameter: Any) -> torch.Tensor:
    """Gather a full copy of a sharded parameter; every rank must call it."""
    import deepspeed  # not before the engine, which imports it without mlflow

    parameter.ds_active_sub_modules.clear()  # so that it can be partitioned again
    with deepspeed.zero.GatheredParameters([parameter]):
        copy: torch.Tensor = parameter.detach().clone()
    return copy


def weights_equal(base: torch.nn.Module, folder: Path, quantization: str) -> bool:
    """Whether the sharded base holds the checkpoint's weights, to the byte."""
    stored = load_file(folder / "model.safetensors")
    equal = True
    for path, module in base.model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = full_parameter(parameter)
            wanted = stored[f"{path}.{name}"]
            if isinstance(module, FrozenLinear) and module.absmax is not None:
                wanted, absmax = quantize_rows(wanted)
                equal &= torch.equal(module.absmax, absmax)
            equal &= torch.equal(full, wanted.to(full.dtype))
        if isinstance(module, FrozenEmbedding):
            every_id = torch.arange(module.num_embeddings)
            equal &= torch.equal(module(every_id), stored[f"{path}.weight"].float())
        if isinstance(module, FrozenHead):
            wanted = stored.get(f"{path}.weight", stored["model.embed_tokens.weight"])
            full = module.block(None, wanted.device).rows
            equal &= torch.equal(full, wanted.to(full.dtype))
    return equal


def shared_files() -> list[str]:
    """List shared-memory files of this process that would outlive it."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]


def full_bytes(model: Any, quantization: str) -> int:
    """Bytes of the unsharded base as stored: one per quantized weight, four per other."""
    total = 0
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            linear = isinstance(module, torch.nn.Linear) and name != "lm_head"
            if name == "lm_head":
                continue
            total += parameter.numel() * (1 if linear and quantization == "int8" else 4)
    return total


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
