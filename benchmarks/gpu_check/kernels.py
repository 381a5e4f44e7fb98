"""Speed of a large matrix product, and of frozen linear layers with each kind of product."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import matmul
from benchmarks.figures import machine
from benchmarks.gpu_check.part import Check
from benchmarks.gpu_check.timing import median_seconds
from trainer.model.layers.matmul_selection import candidates, measure
from trainer.reporting.run_description import versions


def card(check: Check) -> None:
    """Save the name of the card, versions, and the FLOP/s of a square product by type."""
    result: dict[str, Any] = {
        "card": machine() if check.small else torch.cuda.get_device_name(),
        "memory_bytes": None,
        "versions": versions() | {"python": platform.python_version()},
        "flops_per_second": {},
    }
    if not check.small:
        properties = torch.cuda.get_device_properties(0)
        result["memory_bytes"] = properties.total_memory
        result["capability"] = f"{properties.major}.{properties.minor}"
    check.save(result)
    side, rounds = check.sizes.square, check.sizes.rounds
    with check.kernel_device() as device:
        random = torch.randn(side, side, device=device)
        half = random.bfloat16()
        eighth = (random * 40).clamp(-127, 127).to(torch.int8)
        products: dict[str, Callable[[], Tensor]] = {
            "bf16": lambda: half @ half,
            "int8": lambda: torch._int_mm(eighth, eighth.T),
        }
        for kind, product in products.items():
            seconds = median_seconds(product, device, rounds)
            result["flops_per_second"][kind] = 2 * side**3 / seconds
            check.save(result)


def products(check: Check) -> None:
    """Save the times of each layer with each kind of product; raise if a kind fails."""
    work, rounds = check.sizes.products, check.sizes.rounds
    kinds = matmul.KINDS[:-1] if check.small else matmul.KINDS  # bitsandbytes needs a real device
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"tokens": work.tokens, "rows": rows}
    with check.kernel_device() as device:
        for name in work.shapes:
            rows.append(matmul.measure(work, name, rounds, device, kinds))
            check.save(result)
        if not check.small:  # timing waits for the device, and the simulated one has no such call
            chosen = measure(
                candidates(), [*work.shapes.values()], work.dtype, device, matmul.THRESHOLD
            )
            result["auto"] = {"kind": chosen.kind, "reason": chosen.reason}
            check.save(result)
    failures = {kind: reason for row in rows for kind, reason in row["failures"].items()}
    if failures:
        raise RuntimeError("; ".join(f"{kind}: {reason}" for kind, reason in failures.items()))
