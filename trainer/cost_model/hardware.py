"""Devices and the fabrics between them: ``hardware.yaml``, files of users, this machine's CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from trainer.config.types import Number, Section
from trainer.config.yaml_parser import YamlError, parse
from trainer.model.cpu_rates import CpuRates
from trainer.runtime import bootstrap
from trainer.runtime.errors import BadInput, did_you_mean
from trainer.runtime.limits import free_memory, num_cores
from trainer.runtime.process import WAITING_THREADS

DATA_FILE = Path(__file__).with_name("hardware.yaml")
#: Share of the peak of matrix products that training a prompt reaches. Source: LoRA on one H100,
#: 41% (8B) and 43% (7B) of 4 FLOPs per weight and token (NeMo AutoModel, performance summary).
COMPUTE_SHARE = 0.4
#: Share of a fabric's peak that all-gathers reach. Source: ml-engineering (S. Bekman), all-reduce:
#: 235 of 300 GB/s (A100), 366 of 450 GB/s (H200).
FABRIC_SHARE = 0.8
#: Memory of a GPU that a process cannot use: CUDA context, kernels, NCCL.
CONTEXT_BYTES = 1_500_000_000
#: Memory of a process on a CPU before the base is loaded, and of what is compiled later:
#: ``benchmarks.big`` measures it as a part of the peak.
CPU_CONTEXT_BYTES = 600_000_000
#: Memory bandwidth of a GPU without a name, for decoding.
DEFAULT_MEMORY_RATE = 1e12
#: Bytes per second that a node reads from its file system.
STORAGE_RATE = 2e9

Positive = Annotated[float, Number, Field(gt=0, allow_inf_nan=False)]


class Gpu(Section):
    """One entry of ``gpus``; see ``hardware.yaml``."""

    memory_gb: Positive
    bfloat16_tflops: Positive | None
    float32_tflops: Positive
    memory_gb_per_second: Positive
    link: str
    reported: str = ""
    source: str = ""


class Fabric(Section):
    """One entry of ``links`` or ``networks``."""

    gb_per_second: Positive
    per_gpu: bool = True
    source: str = ""


class Hardware(Section):
    """The data file, with the entries of a user's file added."""

    gpus: dict[str, Gpu] = Field(default_factory=dict)
    links: dict[str, Fabric] = Field(default_factory=dict)
    networks: dict[str, Fabric] = Field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """One device, and its share of the fabrics. Rates are what a run reaches, not peaks.

    Attributes:
        name: for people.
        memory_bytes: that a run may use, without ``context_bytes``.
        peak_flops, flops: peak and reached rate of matrix products in the compute type.
        memory_rate: bytes per second.
        link_rate: bytes per second that a device receives inside its node.
        network_rate: bytes per second that a node receives.
        itemsize: bytes per element of ``base.dtype: auto``.
        context_bytes: memory that the process takes for itself: CUDA context, kernels, NCCL; on a
            CPU, imports and compiled operations.
        on_cpu: gathers and products share the cores, so that they do not overlap.
        int8_flops: reached rate of int8 products, on a CPU that has instructions for them.
        loop_rate: bytes per second that an element-wise operation reads and writes, on a CPU.
        shared_rate: bytes per second that a rank gathers from shared memory, its own shard
            included; None: not possible.
        large_flops: on a CPU, reached rate of products with a large matrix in the compute type;
            None: ``flops``.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    itemsize: int = 2
    context_bytes: int = CONTEXT_BYTES
    on_cpu: bool = False
    int8_flops: float | None = None
    loop_rate: float = math.inf
    shared_rate: float | None = None
    large_flops: float | None = None


def read_hardware(extra: Path | None = None) -> Hardware:
    """Read the data file and the entries of a user's file, which replace entries of equal names.

    Raises:
        BadInput: with the mistakes of the user's file.
    """
    own = Hardware.model_validate(parse(DATA_FILE.read_text(encoding="utf-8")).data)
    if extra is None:
        return own
    try:
        theirs = Hardware.model_validate(parse(extra.read_text(encoding="utf-8")).data)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--hardware: {extra} cannot be read: {error}") from None
    except YamlError as error:
        raise BadInput([f"{extra}: {text}" for _, _, text in error.problems]) from None
    except ValidationError as error:
        raise BadInput(
            [f"{extra}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        ) from None
    return Hardware(
        gpus=own.gpus | theirs.gpus,
        links=own.links | theirs.links,
        networks=own.networks | theirs.networks,
    )


Entry = TypeVar("Entry")


def _entry(option: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    if name.lower() in entries:
        return entries[name.lower()]
    longer = [entry for entry in entries if entry.startswith(name.lower())]
    hint = f" (did you mean {' or '.join(longer)}?)" if longer else did_you_mean(name, [*entries])
    raise BadInput(
        f"{option}: {name!r} is not known{hint}; known: "
        f"{', '.join(entries)}; add others with --hardware FILE"
    )


def find_device(
    hardware: Hardware,
    gpu: str | None,
    *,
    gpus_per_node: int,
    network: str,
    memory_bytes: int | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    dtype: str = "auto",
) -> Device:
    """Return a GPU by name, with the given numbers in place of its own.

    Args:
        gpu: None: the numbers describe the GPU, and all three are needed.
        tflops: peak of matrix products in the compute type.
        bandwidth: gigabytes per second that a GPU receives from the others of its node.
        dtype: ``base.dtype``.

    Raises:
        BadInput: with every unknown name and missing number.
    """
    problems: list[str] = []
    device = None
    try:
        fabric = _entry("--network", network, hardware.networks)
    except BadInput as error:
        problems += error.problems
    if gpu is not None:
        try:
            device = _device(_entry("--gpu", gpu, hardware.gpus), gpu.lower(), hardware, dtype)
        except BadInput as error:
            problems += error.problems
    elif None in (memory_bytes, tflops, bandwidth):
        problems.append(
            "--gpu: name a GPU, give --gpu-memory, --tflops and --bandwidth, or --cpu; known: "
            f"{', '.join(hardware.gpus)}"
        )
    if problems:
        raise BadInput(problems)
    if device is None:
        itemsize = 4 if dtype == "float32" else 2
        device = Device("GPU", 0, 0.0, 0.0, DEFAULT_MEMORY_RATE, 0.0, 0.0, itemsize)
    if memory_bytes is not None:
        device = replace(device, memory_bytes=max(0, memory_bytes - CONTEXT_BYTES))
    if tflops is not None:
        device = replace(device, peak_flops=1e12 * tflops, flops=COMPUTE_SHARE * 1e12 * tflops)
    if bandwidth is not None:
        device = replace(device, link_rate=FABRIC_SHARE * 1e9 * bandwidth)
    adapters = gpus_per_node if fabric.per_gpu else 1
    return replace(device, network_rate=FABRIC_SHARE * 1e9 * fabric.gb_per_second * adapters)


def _device(gpu: Gpu, name: str, hardware: Hardware, dtype: str) -> Device:
    link = _entry(f"gpus.{name}.link", gpu.link, hardware.links)
    half = gpu.bfloat16_tflops is not None and dtype != "float32"
    tflops = gpu.bfloat16_tflops if half and gpu.bfloat16_tflops else gpu.float32_tflops
    return Device(
        name,
        int(1e9 * gpu.memory_gb) - CONTEXT_BYTES,
        1e12 * tflops,
        COMPUTE_SHARE * 1e12 * tflops,
        1e9 * gpu.memory_gb_per_second,
        FABRIC_SHARE * 1e9 * link.gb_per_second,
        0.0,
        2 if half else 4,
    )


def this_cpu(ranks: int) -> Device:
    """Measure this machine in another process, which imports torch, and return one of its ranks."""
    threads = max(1, num_cores() // ranks)  # as the launcher sets them
    done = subprocess.run(
        bootstrap.command("trainer.model.cpu_rates"),
        env=WAITING_THREADS | os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=True,
    )
    return cpu_device(ranks, CpuRates(**json.loads(done.stdout.splitlines()[-1])))


def cpu_device(ranks: int, rates: CpuRates) -> Device:
    """Return one of the ranks of this machine, whose cores and memory are divided among them."""
    memory_rate = rates.copy_rate / ranks
    return Device(
        f"CPU ({num_cores()} cores)",
        max(0, free_memory() // ranks - CPU_CONTEXT_BYTES),
        rates.int8_flops or rates.float_flops,
        rates.float_flops,
        memory_rate,
        memory_rate / 2,  # gloo writes to a socket and reads from it
        rates.copy_rate / 2,
        itemsize=4,
        context_bytes=CPU_CONTEXT_BYTES,
        on_cpu=True,
        int8_flops=rates.int8_flops,
        loop_rate=rates.loop_rate,
        shared_rate=rates.shared_rate,
        large_flops=rates.large_flops,
    )


def gpu_named(hardware: Hardware, reported: str) -> str | None:
    """Return the entry of a GPU by the name that its driver reports; None if there is none."""
    words = set(reported.lower().replace("-", " ").split())
    matching = [
        (len(gpu.reported.split()), name)
        for name, gpu in hardware.gpus.items()
        if gpu.reported and set(gpu.reported.lower().split()) <= words
    ]
    return max(matching)[1] if matching else None
