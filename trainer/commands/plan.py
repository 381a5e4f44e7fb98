"""``python -m trainer.commands.plan RUN.yaml --gpus N ...``: what a run needs, before it starts.

Reads the run file, the rows and the headers of the base's weight files. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.check_rows import tokenize_rows, without_torch
from trainer.config import RunConfig, load, parse_bytes, resolve_path
from trainer.runtime import atomic_io
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, BadInput
from trainer.runtime.json_file import read_json_object, to_json
from trainer.runtime.process import flush_and_exit
from trainer.runtime.redact import printable, redact
from trainer.runtime.stdio import lost_output

if TYPE_CHECKING:
    from trainer.cost_model.hardware import Device
    from trainer.cost_model.run_plan import RunNeeds, RunPlan


def main(arguments: Sequence[str], *, hide_torch: bool = False) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        config = load(chosen.run_file, chosen.overrides)
        if hide_torch:
            without_torch()
        _plan(config, chosen)
    except BadInput as error:
        for problem in error.problems:
            print(f"error: {printable(redact(problem))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if lost := lost_output():
        print(f"error: {lost}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.commands.plan")
    parser.add_argument("run_file")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--gpu")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--tflops", type=float)
    parser.add_argument("--bandwidth", type=float)
    parser.add_argument("--network", required=True)
    parser.add_argument("--hardware")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--row-tokens", type=int)
    parser.add_argument("--json")
    return parser


def _plan(config: RunConfig, chosen: argparse.Namespace) -> None:
    """Print and write a plan; raises ``BadInput`` after that if no option fits."""
    from trainer.commands.plan_table import print_plan
    from trainer.cost_model.run_plan import plan_run

    _check_offload(config)
    device = _device(config, chosen)
    nodes = [chosen.gpus_per_node] * (chosen.gpus // chosen.gpus_per_node)
    needs = _needs(config, device, chosen.row_tokens)
    plan = plan_run(needs, device, nodes)
    if chosen.json != "-":
        print_plan(plan, needs)
    _write_json(plan, chosen.json)
    if not any(option.fits for option in plan.options):
        sys.stdout.flush()  # the table comes first
        least = min(plan.options, key=lambda option: option.bytes.total)
        held = plan.device.memory_bytes + plan.device.context_bytes
        raise BadInput(
            f"{chosen.run_file}: does not fit: a rank needs at least "
            f"{least.bytes.total / 1e9:,.2f} of {held / 1e9:,.2f} GB (with engine.shard_group="
            f"{least.shard_group}); use more devices, or devices with more memory"
        )


def _check_offload(config: RunConfig) -> None:
    """Refuse shards in host memory, which the plan's memory and speed do not describe."""
    policy = read_json_object(resolve_path(config.engine.deepspeed))
    offload = policy.get("zero_optimization", {}).get("offload_param", {}).get("device", "none")
    if offload != "none":
        raise BadInput(
            f"engine.deepspeed: {config.engine.deepspeed} keeps the shards in {offload} memory, "
            "which plan does not model; use ds_configs/zero3.json"
        )


def _device(config: RunConfig, chosen: argparse.Namespace) -> Device:
    from trainer.cost_model.hardware import find_device, read_hardware, this_cpu

    if chosen.cpu:
        return this_cpu(chosen.gpus)
    memory = None if chosen.gpu_memory is None else parse_bytes(chosen.gpu_memory)
    return find_device(
        read_hardware(None if chosen.hardware is None else Path(chosen.hardware)),
        chosen.gpu,
        gpus_per_node=chosen.gpus_per_node,
        network=chosen.network,
        memory_bytes=memory,
        tflops=chosen.tflops,
        bandwidth=chosen.bandwidth,
        dtype=config.base.dtype,
    )


def _needs(config: RunConfig, device: Device, row_tokens: int | None) -> RunNeeds:
    from trainer.cost_model.base_headers import open_base_shape
    from trainer.cost_model.run_needs import needs_of_row_tokens, needs_of_tasks
    from trainer.model.base_tokenizer import open_tokenizer
    from trainer.model.families import check_prefix_tuning, context_length

    base, text, stored = open_base_shape(config.base, device.itemsize)
    if any(prompt.entry.trains_prefix for prompt in config.prompts):
        check_prefix_tuning(text, config.base.model)
    if row_tokens is not None:
        virtual = max(prompt.num_virtual_tokens for prompt in config.prompts)
        if row_tokens + virtual > (context := context_length(text)):
            raise BadInput(
                f"--row-tokens: {row_tokens} tokens after {virtual} virtual ones are more than the "
                f"base's context of {context}; use at most {context - virtual}"
            )
        return needs_of_row_tokens(config, row_tokens, base, text, stored)
    config, tasks = tokenize_rows(config, open_tokenizer(config.base))
    return needs_of_tasks(config, tasks, base, text, stored)


def _write_json(plan: RunPlan, path: str | None) -> None:
    if path == "-":
        print(to_json(plan.as_json(), indent=2))
    elif path is not None:
        atomic_io.write_json(Path(path), plan.as_json())


if __name__ == "__main__":
    flush_and_exit(main(sys.argv[1:], hide_torch=True))
