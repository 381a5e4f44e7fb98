"""The command ``promptshard plan``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch import preflight
from launch.arguments import Overrides, RunFile, as_path, option
from launch.start import run_alone
from trainer.config import load, parse_bytes
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

MODULE = "trainer.commands.plan"

Gpu = Annotated[
    str | None,
    option("NAME", "GPU, such as h100-80gb, a100-80gb or h200; another name lists all."),
]
GpuMemory = Annotated[str | None, option("SIZE", "Memory of a GPU, such as 80GB.")]
Tflops = Annotated[
    float | None, option("N", "Peak of matrix products of a GPU, in the compute type.")
]
Bandwidth = Annotated[
    float | None,
    option("N", "GB/s that a GPU receives from the others of its node; for 1 GPU any number."),
]
Network = Annotated[str, option("NAME", "Network between nodes: hdr, ndr, efa or 100gbe.")]
HardwareFile = Annotated[
    str | None,
    option("FILE", "YAML file with more GPUs, links and networks.", "--hardware", callback=as_path),
]
RowTokens = Annotated[
    int | None,
    option("N", "Tokens of every row, in place of those of the rows; reads no tokenizer."),
]


def plan(
    run_file: RunFile,
    gpus: Annotated[int, option("N", "Number of GPUs; with --cpu, of processes.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[
        int | None, option("G", "GPUs of a node. [default: all, up to 8]")
    ] = None,
    gpu: Gpu = None,
    gpu_memory: GpuMemory = None,
    tflops: Tflops = None,
    bandwidth: Bandwidth = None,
    network: Network = "ndr",
    hardware: HardwareFile = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for the CPU of this machine.")] = False,
    row_tokens: RowTokens = None,
    json_file: Annotated[
        str | None, option("FILE", "Write the plan as JSON; -: stdout.", "--json", callback=as_path)
    ] = None,
) -> None:
    """Show what a run needs before it starts: memory, speed and hours for every shard group.

    Reads the run file, the rows and the headers of the base's weight files; needs no GPU. Of a
    model on the hub, only small files and headers are downloaded. `*` marks the shard group that
    `engine.shard_group: auto` takes. Ends with exit code 2 if no shard group fits.

    **Examples:**

    - `promptshard plan run.yaml --gpus 8 --gpu h100-80gb`
    - `promptshard plan run.yaml --gpus 32 --gpus-per-node 8 --gpu a100-80gb --network hdr`
    - `promptshard plan run.yaml --gpus 4 --gpu-memory 48GB --tflops 180 --bandwidth 25`
    - `promptshard plan run.yaml --gpus 2 --cpu --json -`
    """
    arguments = plan_arguments(
        run_file,
        overrides or [],
        gpus,
        gpus_per_node,
        gpu=gpu,
        gpu_memory=gpu_memory,
        tflops=tflops,
        bandwidth=bandwidth,
        network=network,
        hardware=hardware,
        cpu=cpu,
        row_tokens=row_tokens,
    )
    preflight.check_paths(load(run_file, overrides or []))
    if json_file is not None:
        path = json_file if json_file == "-" else preflight.check_new_file(Path(json_file))
        arguments.append(f"--json={path}")
    raise typer.Exit(run_alone(MODULE, arguments, imports="transformers"))


def plan_arguments(
    run_file: str,
    overrides: Sequence[str],
    gpus: int,
    gpus_per_node: int | None,
    *,
    gpu: str | None = None,
    gpu_memory: str | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    network: str = "ndr",
    hardware: str | None = None,
    cpu: bool = False,
    row_tokens: int | None = None,
) -> list[str]:
    """Check the options of a plan and return the arguments of its module.

    Raises:
        BadInput: with every number that is not possible.
    """
    per_node = (gpus if cpu else min(gpus, 8)) if gpus_per_node is None else gpus_per_node
    problems = []
    numbers = (("--gpus", gpus), ("--gpus-per-node", gpus_per_node), ("--row-tokens", row_tokens))
    for name, number in (*numbers, ("--tflops", tflops), ("--bandwidth", bandwidth)):
        if number is not None and not 0 < number < float("inf"):
            problems.append(f"{name}: {number} must be above 0")
    if gpus > 0 and per_node > 0 and gpus % per_node:
        problems.append(
            f"--gpus-per-node: {per_node} does not divide --gpus {gpus}; all nodes have the same "
            "number"
        )
    if gpu_memory is not None:
        try:
            parse_bytes(gpu_memory)
        except ValueError as error:
            problems.append(f"--gpu-memory: {error}")
    described = [gpu, gpu_memory, tflops, bandwidth, hardware]
    if cpu and any(value is not None for value in described):
        problems.append("--cpu: describes this machine; remove the options of a GPU")
    if not cpu and not problems:
        _check_device(gpu, per_node, gpu_memory, tflops, bandwidth, network, hardware)
    if problems:
        raise BadInput(problems)
    options = {
        "gpus": gpus,
        "gpus-per-node": per_node,
        "gpu": gpu,
        "gpu-memory": gpu_memory,
        "tflops": tflops,
        "bandwidth": bandwidth,
        "network": network,
        "hardware": hardware,
        "row-tokens": row_tokens,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [run_file, *overrides, *given, *(["--cpu"] if cpu else [])]


def _check_device(
    gpu: str | None,
    gpus_per_node: int,
    gpu_memory: str | None,
    tflops: float | None,
    bandwidth: float | None,
    network: str,
    hardware: str | None,
) -> None:
    """Raise ``BadInput`` for unknown names and missing numbers before a process starts."""
    from trainer.cost_model.hardware import find_device, read_hardware

    find_device(
        read_hardware(None if hardware is None else Path(hardware)),
        gpu,
        gpus_per_node=gpus_per_node,
        network=network,
        memory_bytes=None if gpu_memory is None else parse_bytes(gpu_memory),
        tflops=tflops,
        bandwidth=bandwidth,
    )


@dataclass(frozen=True)
class PlannedTime:
    """Planned hours of a run, and the time limit to ask Slurm for."""

    hours: float
    time: str


def time_limit(arguments: Sequence[str]) -> PlannedTime:
    """Plan a run with the shard group of its run file.

    Args:
        arguments: of ``plan_arguments``.

    Raises:
        BadInput: the run does not fit with its shard group, but with another one.
        typer.Exit: the run does not fit, or the plan failed; its messages are printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plan.json")
        if code := run_alone(MODULE, [*arguments, f"--json={out}"], imports="transformers"):
            raise typer.Exit(code)
        planned = read_json_object(out)
    option = planned["options"][planned["configured"]]
    if not option["fits"]:
        gigabytes = (option["bytes"]["total"] / 1e9, planned["memory_bytes"] / 1e9)
        groups = [str(o["shard_group"]) for o in planned["options"] if o["fits"]]
        raise BadInput(
            f"submit: {arguments[0]} does not fit: a rank needs {gigabytes[0]:,.1f} of "
            f"{gigabytes[1]:,.1f} GB with engine.shard_group={option['shard_group']}; use "
            f"engine.shard_group={groups[0]}, or submit without --plan"
        )
    return PlannedTime(option["hours"], option["time_limit"])
