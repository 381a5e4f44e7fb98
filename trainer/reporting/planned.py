"""The plan of a run beside what it measures: in the log after a few steps, and in the summary.

Runs on rank 0. A base, GPU or setting that the cost model does not describe has no plan.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence

import torch

from trainer.config import RunConfig
from trainer.cost_model.base_headers import base_shape_of
from trainer.cost_model.base_shape import Header
from trainer.cost_model.hardware import (
    Device,
    cpu_device,
    find_device,
    gpu_named,
    read_hardware,
)
from trainer.cost_model.run_needs import needs_of_tasks
from trainer.cost_model.run_plan import Option, placed_option
from trainer.data.task_data import TaskData
from trainer.distributed.deepspeed_engine import device_name
from trainer.distributed.model_loading import LoadedBase
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.cpu_rates import measure_cpu
from trainer.reporting.summary import Planned
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.process import seconds_since_start
from trainer.training.callbacks import Callback, StepReport

#: Steps of this process after which the plan is compared.
STEPS = 20
#: Network between nodes that the plan of a run assumes.
NETWORK = "ndr"


def plan_of_run(
    config: RunConfig,
    files: BaseFiles,
    tasks: Mapping[str, TaskData],
    loaded: LoadedBase,
    device: torch.device,
    nodes: Sequence[int],
) -> Option | None:
    """Plan a run as it was placed; None if the cost model does not describe it.

    Args:
        nodes: ranks of each node.
    """
    headers = {name: Header(t.type, t.shape) for name, t in files.tensors.items()}
    try:
        hardware = _hardware_of(config, device, nodes)
        base = base_shape_of(headers, files.config, config.base, loaded.dtype.itemsize)
    except BadInput:
        return None
    if hardware is None:
        return None
    needs = needs_of_tasks(config, tasks, base, files.config, files.num_bytes)
    return placed_option(needs, hardware, nodes, loaded.placement, loaded.memory, loaded.budget)


def _hardware_of(config: RunConfig, device: torch.device, nodes: Sequence[int]) -> Device | None:
    if device.type == "cpu":
        return cpu_device(nodes[0], measure_cpu())
    data = read_hardware()
    name = gpu_named(data, device_name(device))
    if name is None:
        return None
    return find_device(data, name, gpus_per_node=nodes[0], network=NETWORK, dtype=config.base.dtype)


def node_sizes(world_size: int) -> list[int]:
    """Ranks of each node, all nodes alike, from the launcher's environment."""
    local = int(os.environ.get("LOCAL_SIZE", world_size))
    return [local] * max(1, world_size // local)


def as_summary(plan: Option) -> Planned:
    """Select what the summary keeps of a plan."""
    return Planned(
        seconds=sum(plan.seconds.values()),
        step_seconds=plan.step_seconds,
        useful_tokens_per_second=plan.useful_tokens_per_second,
        base_bytes_per_rank=plan.bytes.base_shard,
        peak_bytes=plan.bytes.total,
        saved_bytes=plan.cost.saved_bytes,
        gathered_bytes_per_step=plan.cost.gathered_bytes,
        flops_per_step=plan.cost.flops,
        load_seconds=plan.load_seconds,
    )


class PlanComparison(Callback):
    """Prints planned and measured hours once, after ``STEPS`` steps of this process."""

    def __init__(self, plan: Option, console: Console) -> None:
        self._plan, self._console = plan, console
        self._steps = itertools.count(1)
        self._started = time.monotonic() - seconds_since_start()

    def on_step_end(self, report: StepReport) -> None:
        if next(self._steps) != STEPS:
            return
        measured = time.monotonic() - self._started + report.seconds_left
        self._console.print(
            f"planned {_hours(sum(self._plan.seconds.values()))}, at the measured rate "
            f"{_hours(measured)}; planned {self._plan.useful_tokens_per_second:,.0f} useful "
            f"tokens/s, measured {report.tokens_per_second:,.0f} in step {report.step}"
        )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
