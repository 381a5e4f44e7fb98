"""The simulated device of ``tests.other_device`` as the accelerator of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from deepspeed import accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.distributed import distributed_c10d

from tests.other_device import DEVICE, OnDevice, other_device

MEMORY_BYTES = 8 << 30


class SimulatedAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """One device per rank; gloo takes the place of NCCL, and streams are left out."""

    def device_name(self, device_index: int | None = None) -> str:
        return DEVICE.type if device_index is None else f"{DEVICE.type}:{device_index}"

    def current_device_name(self) -> str:
        return str(DEVICE)

    def current_device(self) -> int:
        return 0

    def device(self, device_index: int | None = None) -> torch.device:
        return DEVICE

    def set_device(self, device_index: int) -> None: ...

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self) -> bool:
        return False

    def on_accelerator(self, tensor: Tensor) -> bool:
        return isinstance(tensor, OnDevice)

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None: ...

    def available_memory(self, device_index: int | None = None) -> int:
        return MEMORY_BYTES

    def empty_cache(self) -> None: ...


@contextmanager
def simulated_accelerator() -> Iterator[None]:
    """Within the context, the ranks of this process compute on the device, and send from there."""
    before = accelerator.get_accelerator()
    accelerator.set_accelerator(SimulatedAccelerator())
    try:
        with (
            patch.object(distributed_c10d, "_get_object_coll_device", lambda group=None: DEVICE),
            other_device(),
        ):
            yield
    finally:
        accelerator.set_accelerator(before)
