"""Count FLOPs of a step and bytes saved for backward, and measure shares of its time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten


def _linear_flop(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of ``x @ weight.T``, [..., K] and [N, K]."""
    return 2 * x.numel() * len(weight)


#: FLOP formulas by operator packet: those of torch, and of CPU operators that torch leaves out.
FORMULAS = flop_registry | {
    aten._int_mm: mm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
if torch.backends.mkldnn.is_available():
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear_flop


class FlopCounter(TorchDispatchMode):
    """Counts two FLOPs per multiply and add of every matrix product, integer ones too.

    ``FlopCounterMode`` also hooks every module, which ``torch.autograd.grad`` refuses.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class PeakSavedBytes:
    """Peak of the bytes that autograd saves for backward.

    Each storage is counted once; storages of parameters are not counted.
    """

    def __init__(self, parameters: Any) -> None:
        self._parameters = parameters
        self._users: dict[int, int] = {}
        self._now = self.peak = 0

    @contextmanager
    def counting(self) -> Iterator[PeakSavedBytes]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor):
            yield self

    def _pack(self, tensor: Tensor) -> _Saved:
        own = {p.untyped_storage().data_ptr() for p in self._parameters()}
        storage = tensor.untyped_storage()
        counts = tensor.device.type != "meta" and storage.data_ptr() not in own
        return _Saved(self, tensor, (storage.data_ptr(), storage.nbytes()) if counts else None)

    def take(self, storage: tuple[int, int]) -> None:
        address, size = storage
        users = self._users.get(address, 0)
        self._users[address] = users + 1
        if not users:
            self._now += size
            self.peak = max(self.peak, self._now)

    def drop(self, storage: tuple[int, int]) -> None:
        address, size = storage
        self._users[address] -= 1
        if not self._users[address]:
            self._now -= size


class _Saved:
    def __init__(
        self, counter: PeakSavedBytes, tensor: Tensor, storage: tuple[int, int] | None
    ) -> None:
        self.tensor, self._counter, self._storage = tensor, counter, storage
        if storage:
            counter.take(storage)

    def __del__(self) -> None:
        if self._storage:
            self._counter.drop(self._storage)


#: Parts of a step by operators, and by functions that contain operators. An operator inside
#: attention counts as attention, whatever it does. What int8 products do besides multiplying is
#: quantization.
KINDS = {
    "gather": ("all_gather", "allgather", "_dist_allgather", "all_reduce", "allreduce", "c10d"),
    "attention": (
        *("scaled_dot_product", "softmax", "aten::bmm", "baddbmm"),
        "_PackedOnCpu",
    ),
    "products": ("aten::mm", "aten::addmm", "_int_mm", "aten::linear", "mkldnn::"),
    "quantization": ("_Int8",),
    "loops": ("CompiledFxGraph",),
}


def part_of(event: FunctionEvent) -> str:
    """Return the part of a step that an operator belongs to: of ``KINDS``, or rest."""
    names, parent = [event.name], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    for kind, words in KINDS.items():
        if any(word in name for word in words for name in names):
            return kind
    return "rest"


def step_shares(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Return the shares of a step's CPU time, by part.

    Args:
        events: of the profiler, not averaged.
    """
    seconds = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in events:
        seconds[part_of(event)] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()}
