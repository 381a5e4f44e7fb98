"""Rates of this machine's CPU, with the threads of one rank. Imports torch only to measure them.

``python -m trainer.model.cpu_rates`` prints them as JSON, for programs without torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

#: Tokens, input and output features of the measured products, as of a small base.
_SHAPE = (512, 768, 2048)
#: Elements of the measured loop, as of a packed batch inside an MLP; bytes of the block that is
#: copied, which no cache holds; number of measurements.
_LOOP_ELEMENTS, _BLOCK_BYTES, _REPEATS = 2 << 20, 32 << 20, 5


@dataclass(frozen=True)
class CpuRates:
    """Rates that operations of torch reach.

    Attributes:
        float_flops, int8_flops: of products in fp32 and int8; None without int8 instructions.
        loop_rate: bytes per second that an element-wise operation reads and writes.
        copy_rate: bytes per second that are copied in memory.
    """

    float_flops: float
    int8_flops: float | None
    loop_rate: float
    copy_rate: float


def measure_cpu(clock: Callable[[], float] = time.perf_counter) -> CpuRates:
    """Measure the rates, in a fraction of a second."""
    import torch

    tokens, inputs, outputs = _SHAPE
    x, weight = torch.ones(tokens, inputs), torch.ones(inputs, outputs)
    small, small_weight = x.to(torch.int8), weight.to(torch.int8)
    one, two, target = (torch.ones(_LOOP_ELEMENTS) for _ in range(3))
    block = torch.zeros(_BLOCK_BYTES, dtype=torch.uint8)

    def fastest(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(_REPEATS):
            started = clock()
            work()
            seconds.append(clock() - started)
        return max(min(seconds), 1e-9)

    flops = 2 * tokens * inputs * outputs
    int8_flops = None
    if torch.cpu._is_vnni_supported():
        int8_flops = flops / fastest(lambda: torch._int_mm(small, small_weight))
    return CpuRates(
        float_flops=flops / fastest(lambda: x @ weight),
        int8_flops=int8_flops,
        loop_rate=3 * one.nbytes / fastest(lambda: torch.add(one, two, out=target)),
        copy_rate=_BLOCK_BYTES / fastest(block.clone),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure_cpu())))
