"""Time functions on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 3


def median_seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a call, which ends when the device has finished its work."""
    seconds = []
    for _ in range(WARM_UP + rounds):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
