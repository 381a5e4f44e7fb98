"""Plan large bases on many GPUs, and simulate the gathers of a step of each plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from benchmarks.scaling.gather_simulation import Layer, step_seconds
from trainer.config import Base, RunConfig
from trainer.cost_model.base_headers import base_shape_of
from trainer.cost_model.base_shape import BaseShape, Header
from trainer.cost_model.hardware import Device, find_device, read_hardware
from trainer.cost_model.run_needs import RunNeeds, needs_of_row_tokens
from trainer.cost_model.run_plan import Option, plan_option
from trainer.cost_model.step_cost import live_bytes
from trainer.distributed.placement import AUTO_SHARE, place
from trainer.model.transformers_model import build_transformers_model

CONFIGS = Path(__file__).with_name("configs.json")
#: Rows of a run file must exist; their number and length are not used.
ROWS = Path(__file__).parents[2] / "examples" / "data" / "triage.valid.jsonl"
GPU, GPUS_PER_NODE = "h100-80gb", 8
GPUS = tuple(2**n for n in range(11))
#: Networks from fast to slow; plans are made for the first.
NETWORKS = ("ndr", "hdr", "100gbe")
#: Useful tokens that a GPU reads in a step for each prompt, and tokens of a row.
TOKENS, ROW_TOKENS = 4096, 512
#: Prompts that are trained at a time.
BANKS = (1, 4, 16)


@dataclass(frozen=True)
class LargeBase:
    """A base by its published config; weights are never allocated."""

    name: str
    text: PretrainedConfig
    shape: BaseShape
    stored_bytes: int


def large_bases() -> list[LargeBase]:
    configs: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    return [_large_base(name, settings) for name, settings in configs.items()]


def _large_base(name: str, settings: dict[str, Any]) -> LargeBase:
    config = AutoConfig.for_model(**settings)
    weights = build_transformers_model(config, name, dtype=torch.bfloat16).state_dict()
    headers = {key: Header("BF16", tuple(weight.shape)) for key, weight in weights.items()}
    shape = base_shape_of(headers, config, Base(model=name), itemsize=2)
    return LargeBase(name, config, shape, sum(weight.nbytes for weight in weights.values()))


def device_with(network: str) -> Device:
    return find_device(read_hardware(), GPU, gpus_per_node=GPUS_PER_NODE, network=network)


def nodes(gpus: int) -> list[int]:
    return [min(gpus, GPUS_PER_NODE)] * -(-gpus // GPUS_PER_NODE)


def smallest_group(base: LargeBase, device: Device, gpus: int) -> int:
    """The shard group that ``engine.shard_group: auto`` takes."""
    memory = int(AUTO_SHARE * device.memory_bytes)
    placed = place(
        base.shape.size, "auto", memory, nodes(gpus), free=device.memory_bytes, flexible=True
    )
    return placed.group_size


def plan_group(base: LargeBase, device: Device, group: int, prompts: int = 1) -> Option:
    """Plan one shard group. All groups of a run have the same plan."""
    return plan_option(_needs(base, group, prompts), device, nodes(group), group)


def _needs(base: LargeBase, ranks: int, prompts: int) -> RunNeeds:
    config = RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": base.name},
            "tasks": [{"name": "t", "train": str(ROWS), "input": "{text}", "target": "{label}"}],
            "prompts": [
                {"name": f"p{k}", "task": "t", "num_virtual_tokens": 20, "init": "random"}
                for k in range(prompts)
            ],
            "training": {"steps": 1, "tokens_per_step": TOKENS * ranks},
        }
    )
    return needs_of_row_tokens(config, ROW_TOKENS, base.shape, base.text, base.stored_bytes)


def passes(base: BaseShape, option: Option, device: Device, wire: float = 1.0) -> list[Layer]:
    """Layers of a step in the order in which a rank computes them.

    Kept layers are received in the first forward pass only, and the last layers of a forward pass,
    which are still gathered, not again for the backward pass that follows.

    Args:
        wire: bytes on the wire per stored byte: 2 for weights sent in 16 bits.
    """
    cost, group = option.cost, option.placement.group_size
    sizes = base.layer_bytes()
    passes_each = 3 if option.budget.checkpointing else 2
    seconds = cost.flops / device.flops / cost.micro_batches / passes_each / len(sizes)
    share = wire * (group - 1) / group
    layers: list[Layer] = []
    kept = _count(sizes, option.placement.kept_bytes)
    live = _count(sizes[::-1], live_bytes(base))
    for batch in range(cost.micro_batches):
        for number, size in enumerate(sizes):
            held = number < kept and batch > 0
            layers.append(Layer(0.0 if held else share * size, seconds))
        for number, size in reversed(list(enumerate(sizes))):
            held = number < kept or number >= len(sizes) - live
            layers.append(Layer(0.0 if held else share * size, seconds * (passes_each - 1)))
    return layers


def _count(sizes: list[int], room: int) -> int:
    """Number of the first sizes that fit into ``room``."""
    count = 0
    for size in sizes:
        room -= size
        if room < 0:
            break
        count += 1
    return count


def simulated_seconds(base: BaseShape, option: Option, device: Device, wire: float = 1.0) -> float:
    """Seconds of a step by simulation."""
    rates = {"link": device.link_rate}
    if option.placement.group_size > GPUS_PER_NODE:
        rates["network"] = device.network_rate
    return step_seconds(passes(base, option, device, wire), rates)


def measure(base: LargeBase, groups: tuple[int, ...] = GPUS) -> dict[str, Any]:
    """All plans and simulations of one base."""
    device = device_with(NETWORKS[0])
    auto = {gpus: smallest_group(base, device, gpus) for gpus in GPUS}
    rows = [_row(base, group) for group in groups]
    slow = next((g for g in groups if g > GPUS_PER_NODE and g >= auto[GPUS[-1]]), groups[-1])
    banks = [{"prompts": k} | _row(base, slow, k) for k in BANKS]
    return {"name": base.name, "auto": auto, "groups": rows, "bank_group": slow, "banks": banks}


def _row(base: LargeBase, group: int, prompts: int = 1) -> dict[str, Any]:
    """Useful tokens per second and GPU of one shard group, planned and simulated, by network."""
    option = plan_group(base, device_with(NETWORKS[0]), group, prompts)
    useful = option.useful_tokens_per_second * option.step_seconds / group
    row: dict[str, Any] = {
        "group": group,
        "fits": option.fits,
        "bytes": option.bytes.total,
        "kept_bytes": option.placement.kept_bytes,
        "micro_batch_tokens": option.budget.tokens,
        "micro_batches": option.cost.micro_batches,
        "checkpointing": option.budget.checkpointing,
        "gathered_bytes": option.cost.gathered_bytes,
        "limited_by": option.limited_by,
        "planned": useful / option.step_seconds,
        "simulated": {},
    }
    for network in NETWORKS:
        device = device_with(network)
        row["simulated"][network] = {
            name: useful / simulated_seconds(base.shape, option, device, wire)
            for name, wire in (("int8", 1.0), ("16 bits", 2.0))
        }
    return row
