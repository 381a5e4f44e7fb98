"""Plan of a run: for every shard group, memory, speed and hours. Imports no torch.

A step takes as long as its products or its gathers, whichever is longer, because layers are
gathered ahead; on a CPU, where both use the same cores, as long as both together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.config import RunConfig, parse_bytes
from trainer.cost_model.hardware import STORAGE_RATE, Device
from trainer.cost_model.run_needs import RunNeeds
from trainer.cost_model.run_time import BATCH_SECONDS, phase_seconds
from trainer.cost_model.step_cost import StepCost, live_bytes, step_cost
from trainer.cost_model.step_work import step_work
from trainer.distributed.placement import (
    AUTO_SHARE,
    LEAST_SHARED_BYTES,
    Placement,
    place,
    sensible_groups,
)
from trainer.packing.activation_memory import (
    CPU_COLUMNS,
    INT8_MATMUL_MIN_HIDDEN,
    LEAST_TOKENS,
    LOGITS_COPIES,
    ONEDNN_MIN_ELEMENTS,
    BatchMemory,
    TokenBudget,
)
from trainer.packing.run_budget import prompt_bytes, run_budget

#: Memory of a process on a CPU beside these parts: objects of the model, and freed memory that the
#: C library keeps for reuse, in multiples of the activations (1.1 to 2.6 with 11 small bases).
#: Recomputed layers are freed at once (``freed_memory.return_freed_memory``).
CPU_SLACK_BYTES, CPU_FREED = 5_000_000, 1.5
#: On a CPU: the share of the rate of fp32 products that attention reaches; tensors of hidden size
#: that element-wise operations of a layer read and write; seconds of a layer's calls; factor
#: of both if layers are recomputed. Fitted to ``benchmarks.step_time``.
CPU_ATTENTION_SHARE, CPU_LOOPS, CPU_LAYER_SECONDS, CPU_RECOMPUTED = 0.41, 280, 0.01, 2.0
#: Copies of a matrix while it is dequantized: converted, and scaled.
DEQUANTIZED_COPIES = 2
#: Share of a GPU's memory for activations and gathered layers that fragments.
FRAGMENTS = 0.05
#: Time limit in multiples of the planned time, and the seconds added to it.
LIMIT_FACTOR, LIMIT_SECONDS = 1.25, 600


@dataclass(frozen=True)
class Bytes:
    """Bytes of a device's memory by part.

    Attributes:
        base_shard: shard and row scales.
        gathered: layers gathered at a time, and those kept until the step ends.
        activations: of the longest packed batch, with the copies of the matrix it is multiplied by.
        head: slices of logits, as far as they exceed other temporary tensors.
        prompts: prompts, encoders, gradients, optimizer states.
        other: memory of the process itself, fragments, freed memory.
    """

    base_shard: int
    gathered: int
    activations: int
    head: int
    prompts: int
    other: int

    @property
    def needed(self) -> int:
        """Bytes of all tensors at the peak."""
        parts = (self.base_shard, self.gathered, self.activations, self.head)
        return sum(parts) + self.prompts

    @property
    def total(self) -> int:
        return self.needed + self.other

    def as_json(self) -> dict[str, int]:
        return vars(self) | {"total": self.total}


@dataclass(frozen=True)
class Option:
    """The plan with one shard group.

    Attributes:
        bytes: of a device; ``fits`` compares their total with its memory.
        step_seconds: of one update of all prompts.
        limited_by: compute, intra-node fabric, inter-node fabric or memory.
        roofline_share: reached share of the peak of the devices' matrix products.
        seconds: by phase, without training's share of saving checkpoints.
    """

    shard_group: int
    fits: bool
    bytes: Bytes
    placement: Placement
    budget: TokenBudget
    cost: StepCost
    step_seconds: float
    useful_tokens_per_second: float
    limited_by: str
    roofline_share: float
    load_seconds: float
    seconds: dict[str, float]
    world_size: int

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def limit(self) -> str:
        """Slurm's --time to ask for, a multiple of 5 minutes."""
        seconds = LIMIT_FACTOR * sum(self.seconds.values()) + LIMIT_SECONDS
        minutes = 5 * math.ceil(seconds / 300)
        days, minutes = divmod(minutes, 24 * 60)
        clock = f"{minutes // 60:02}:{minutes % 60:02}:00"
        return f"{days}-{clock}" if days else clock

    def as_json(self) -> dict[str, Any]:
        return {
            "shard_group": self.shard_group,
            "fits": self.fits,
            "bytes": self.bytes.as_json(),
            "kept_bytes": self.placement.kept_bytes,
            "micro_batch_tokens": self.budget.tokens,
            "micro_batches": self.cost.micro_batches,
            "gradient_checkpointing": self.budget.checkpointing,
            "saved_bytes": self.cost.saved_bytes,
            "gathered_bytes_per_step": self.cost.gathered_bytes,
            "flops_per_step": self.cost.flops,
            "step_seconds": self.step_seconds,
            "useful_tokens_per_second": self.useful_tokens_per_second,
            "roofline_share": self.roofline_share,
            "load_seconds": self.load_seconds,
            "seconds": self.seconds,
            "hours": self.hours,
            "gpu_hours": self.hours * self.world_size,
            "limited_by": self.limited_by,
            "time_limit": self.limit,
        }


@dataclass(frozen=True)
class RunPlan:
    """Options by shard group, ascending.

    Attributes:
        recommended: index of the option that ``engine.shard_group: auto`` takes.
        configured: index of the option of the run file's ``engine.shard_group``.
    """

    device: Device
    node_sizes: tuple[int, ...]
    options: tuple[Option, ...]
    recommended: int
    configured: int
    settings: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "recommended": self.recommended,
            "configured": self.configured,
            "options": [option.as_json() for option in self.options],
            "device": self.device.name,
            "memory_bytes": self.device.memory_bytes + self.device.context_bytes,
            "world_size": sum(self.node_sizes),
            "nodes": len(self.node_sizes),
            "settings": self.settings,
        }


def plan_run(needs: RunNeeds, device: Device, node_sizes: Sequence[int]) -> RunPlan:
    """Plan a run for every sensible shard group, and for that of the run file.

    Raises:
        BadInput: ``engine.shard_group`` does not divide the ranks.
    """
    setting, size = needs.config.engine.shard_group, needs.base.size
    memory = _base_memory(needs.config, device)
    flexible = needs.config.engine.base_memory == "auto"
    chosen = {
        name: place(
            size, name, memory, node_sizes, free=device.memory_bytes, flexible=flexible
        ).group_size
        for name in ("auto", setting)
    }
    groups = sorted({*sensible_groups(node_sizes), *chosen.values()})
    options = tuple(plan_option(needs, device, node_sizes, group) for group in groups)
    recommended = groups.index(chosen["auto"])
    best = options[recommended]
    settings = {
        "engine.shard_group": best.shard_group,
        "training.micro_batch_tokens": best.budget.tokens,
        "engine.gradient_checkpointing": best.budget.checkpointing,
    }
    return RunPlan(
        device, tuple(node_sizes), options, recommended, groups.index(chosen[setting]), settings
    )


def _base_memory(config: RunConfig, device: Device) -> int:
    setting = config.engine.base_memory
    return int(AUTO_SHARE * device.memory_bytes) if setting == "auto" else parse_bytes(setting)


def plan_option(needs: RunNeeds, device: Device, node_sizes: Sequence[int], group: int) -> Option:
    """Plan a run with shard groups of ``group`` ranks."""
    placement = place(
        needs.base.size,
        group,
        _base_memory(needs.config, device),
        node_sizes,
        free=device.memory_bytes,
    )
    memory, budget = run_budget(
        needs.config,
        needs.sizes,
        needs.lengths,
        vocab_size=needs.base.vocab_size,
        world_size=sum(node_sizes),
        itemsize=device.itemsize,
        left_bytes=placement.left_bytes,
        packed=needs.packed,
        on_cpu=device.on_cpu,
    )
    return placed_option(needs, device, node_sizes, placement, memory, budget)


def placed_option(
    needs: RunNeeds,
    device: Device,
    node_sizes: Sequence[int],
    placement: Placement,
    memory: BatchMemory,
    budget: TokenBudget,
) -> Option:
    """Plan a run whose base is placed and whose token budget is chosen, as a run has them."""
    group, world = placement.group_size, sum(node_sizes)
    cost, useful = _mean_cost(needs, device, placement, memory, budget, world)
    parts = option_bytes(needs, device, placement, memory, budget.checkpointing, cost)
    compute = compute_seconds(needs, device, cost, budget.checkpointing)
    intra = _node_seconds(needs, device, cost, group, node_sizes[0])
    inter = cost.gathered_bytes / device.network_rate if group > node_sizes[0] else 0.0
    gather = max(intra, inter)
    exposed = gather if device.on_cpu else gather / (2 * needs.sizes.layers)
    seconds = (compute if device.on_cpu else max(compute, gather)) + exposed
    seconds += BATCH_SECONDS * cost.micro_batches
    fits = parts.total <= device.memory_bytes + device.context_bytes
    limited = "compute"
    step_tokens = needs.config.training.tokens_per_step / world
    if not fits or budget.tokens <= LEAST_TOKENS < step_tokens:
        limited = "memory"
    elif gather > compute:
        limited = "inter-node fabric" if inter > intra else "intra-node fabric"
    load = needs.stored_bytes * min(1.0, node_sizes[0] / group) / STORAGE_RATE
    generated = world * max(1, budget.generation_tokens())
    # Scoring has no backward; its int8 products may have more terms than those of a step.
    product = int8_product_seconds(needs, device, cost)
    training, scoring = _int8_terms(needs.config.base.matmul)
    forward = (seconds - (training + 1) * product) / 2 + scoring * product
    return Option(
        group,
        fits,
        parts,
        placement,
        budget,
        cost,
        seconds,
        useful / seconds,
        limited,
        cost.flops / (seconds * device.peak_flops),
        load,
        phase_seconds(needs, device, seconds, forward / useful, load, generated),
        world,
    )


def compute_seconds(needs: RunNeeds, device: Device, cost: StepCost, checkpointing: bool) -> float:
    """Seconds of a rank's products in a step; on a CPU, also of what is between them."""
    if not device.on_cpu:
        return cost.flops / device.flops
    sizes, stored = needs.sizes, [*needs.base.weights, needs.base.head]
    int8 = int8_product_seconds(needs, device, cost)
    terms, _ = _int8_terms(needs.config.base.matmul)
    exact = _exact_seconds(needs, device, cost.linear_flops)
    linear = (terms + 1) * int8 if int8 else (terms + 1) / 2 * exact
    head = cost.flops - cost.linear_flops - cost.attention_flops
    slice_elements = min(CPU_COLUMNS, needs.base.vocab_size) * needs.base.hidden
    products = linear + head / _exact_rate(device, slice_elements)
    attention = cost.attention_flops / (CPU_ATTENTION_SHARE * device.flops)
    # Weights in another type are converted in forward and in backward.
    converted = sum(
        weight.elements * (weight.itemsize + device.itemsize)
        for weight in stored
        if weight.itemsize != device.itemsize
        and weight.used + (weight is needs.base.head)
        and not (int8 and weight.rows)
    )
    looped = device.itemsize * sizes.layers * CPU_LOOPS * sizes.hidden * cost.step_tokens
    calls = CPU_LAYER_SECONDS * sizes.layers * cost.micro_batches
    between = looped / device.loop_rate + calls
    if checkpointing:
        between *= CPU_RECOMPUTED
    return products + attention + between + 2 * cost.micro_batches * converted / device.loop_rate


def _exact_rate(device: Device, elements: int) -> float:
    """Rate of products with a matrix of so many elements in the compute type, on a CPU."""
    large = elements >= ONEDNN_MIN_ELEMENTS
    return device.large_flops if large and device.large_flops else device.flops


def _exact_seconds(needs: RunNeeds, device: Device, flops: float) -> float:
    """Seconds of the layers' products in the compute type, of which each weight has a share."""
    used = [(w.elements * w.used, _exact_rate(device, w.elements)) for w in needs.base.weights]
    total = sum(elements for elements, _ in used)
    return flops * sum(elements / rate for elements, rate in used) / max(1.0, total)


def int8_product_seconds(needs: RunNeeds, device: Device, cost: StepCost) -> float:
    """Seconds of a step's int8 products of one term in forward on a CPU; 0 if there are none."""
    rate = device.int8_flops
    return cost.linear_flops / 2 / rate if rate and _multiplies_int8(needs, device) else 0.0


def _int8_terms(matmul: str) -> tuple[int, int]:
    """int8 terms of activations in training and in scoring, as ``matmul_selection.INT8_TERMS``."""
    return {"int8x2": (2, 2), "int8_outliers": (1, 1), "bitsandbytes": (1, 1)}.get(matmul, (1, 2))


def _multiplies_int8(needs: RunNeeds, device: Device) -> bool:
    """Whether a CPU multiplies int8 by int8, without converting weights."""
    settings = needs.config.base
    if settings.quantization != "int8" or device.int8_flops is None:
        return False
    if settings.matmul == "auto":
        return needs.sizes.hidden >= INT8_MATMUL_MIN_HIDDEN
    return settings.matmul != "dequantize"


def _node_seconds(
    needs: RunNeeds, device: Device, cost: StepCost, group: int, node_size: int
) -> float:
    """Seconds in which a rank receives the bytes of a step at the rate inside its node."""
    rate = device.shared_rate if needs.stored_bytes >= LEAST_SHARED_BYTES else None
    if rate is None or not 1 < group <= node_size:
        return cost.gathered_bytes / device.link_rate
    layers = (cost.gathered_bytes - cost.exchanged_bytes) * group / (group - 1)
    return layers / rate + cost.exchanged_bytes / device.link_rate


def _mean_cost(
    needs: RunNeeds,
    device: Device,
    placement: Placement,
    memory: BatchMemory,
    budget: TokenBudget,
    world: int,
) -> tuple[StepCost, float]:
    """Mean cost of the sampled steps, with the largest packed batch, and their useful tokens."""
    costs = [
        step_cost(
            needs.base,
            memory,
            placement,
            step_work(rows, needs.prompt_lengths, world, budget.tokens),
            checkpointing=budget.checkpointing,
            itemsize=device.itemsize,
            on_cpu=device.on_cpu,
        )
        for rows in needs.steps_rows
    ]
    number = len(costs)
    largest = max(costs, key=lambda cost: cost.tokens)
    mean = replace(
        largest,
        flops=sum(cost.flops for cost in costs) / number,
        linear_flops=sum(cost.linear_flops for cost in costs) / number,
        attention_flops=sum(cost.attention_flops for cost in costs) / number,
        step_tokens=sum(cost.step_tokens for cost in costs) // number,
        gathered_bytes=sum(cost.gathered_bytes for cost in costs) // number,
        exchanged_bytes=sum(cost.exchanged_bytes for cost in costs) // number,
        micro_batches=max(cost.micro_batches for cost in costs),
    )
    useful = sum(row.num_tokens for rows in needs.steps_rows for row in rows) / number
    return mean, useful


def option_bytes(
    needs: RunNeeds,
    device: Device,
    placement: Placement,
    memory: BatchMemory,
    checkpointing: bool,
    cost: StepCost,
) -> Bytes:
    """Peak memory of a device by part."""
    group = placement.group_size
    gathered = 0
    if group > 1:  # the head, if it is gathered, takes the place of other layers
        total = needs.base.gathered_bytes
        gathered = min(total, placement.kept_bytes + live_bytes(needs.base))
    memory = replace(memory, margin=1.0)
    activations = int(cost.tokens * memory.peak(checkpointing, cost.unread))
    temporary = activations - int(cost.tokens * memory.saved(checkpointing, cost.unread))
    copies = int(DEQUANTIZED_COPIES * device.itemsize * needs.base.largest_quantized)
    if _multiplies_int8(needs, device):
        copies = 0
    if device.on_cpu:
        other = CPU_SLACK_BYTES + (0 if checkpointing else int(CPU_FREED * activations))
    else:
        other = int(FRAGMENTS * (activations + copies + gathered))
    return Bytes(
        base_shard=needs.base.resident_bytes(group),
        gathered=gathered,
        activations=activations + copies,
        head=max(0, LOGITS_COPIES * cost.logits_bytes - temporary),
        prompts=prompt_bytes(needs.config, needs.sizes),
        other=device.context_bytes + other,
    )
