"""Rates of this machine's CPU, with the threads of one rank. Imports torch only to measure them.

``python -m trainer.model.cpu_rates`` prints them as JSON, for programs without torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

#: Tokens, input and output features of the measured products, as of a small base.
_SHAPE = (512, 768, 2048)
#: Output features of a matrix that ``float_matmul`` counts as large.
_LARGE_OUTPUTS = 8192
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
        shared_rate: bytes per second gathered by one of two ranks from shared memory: half of them
            are its own, half are read (``shared_shards``). None where that is not possible.
        large_flops: of products in fp32 with a large matrix (``float_matmul``).
    """

    float_flops: float
    int8_flops: float | None
    loop_rate: float
    copy_rate: float
    shared_rate: float | None = None
    large_flops: float | None = None


def measure_cpu(clock: Callable[[], float] = time.perf_counter) -> CpuRates:
    """Measure the rates, in a fraction of a second."""
    import torch

    from trainer.model.layers.float_matmul import times_transposed

    tokens, inputs, outputs = _SHAPE
    x, weight = torch.ones(tokens, inputs), torch.ones(inputs, outputs)
    large = torch.ones(_LARGE_OUTPUTS, inputs)
    small, small_weight = x.to(torch.int8), weight.to(torch.int8)
    one, two, target = (torch.ones(_LOOP_ELEMENTS) for _ in range(3))
    block = torch.zeros(_BLOCK_BYTES, dtype=torch.uint8)
    own, other = torch.zeros_like(block).numpy(), torch.zeros_like(block).numpy()

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
    shared_rate = None
    with suppress(AttributeError, OSError):  # another system, or forbidden
        file = os.memfd_create("rate")
        os.pwrite(file, block.numpy().data, 0)

        def gather() -> None:
            own[:] = block.numpy()
            os.preadv(file, [other.data], 0)

        shared_rate = 2 * _BLOCK_BYTES / fastest(gather)
        os.close(file)
    return CpuRates(
        float_flops=flops / fastest(lambda: x @ weight),
        int8_flops=int8_flops,
        loop_rate=3 * one.nbytes / fastest(lambda: torch.add(one, two, out=target)),
        copy_rate=_BLOCK_BYTES / fastest(block.clone),
        shared_rate=shared_rate,
        large_flops=2 * tokens * large.numel() / fastest(lambda: times_transposed(x, large)),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure_cpu())))
