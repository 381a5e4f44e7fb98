"""Turn the shards that a rank has read into ZeRO-3 parameters, and exchange rows between shards.

``deepspeed_engine``, the only importer of DeepSpeed, passes its ``zero.Init`` in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.placement import BaseSize
from trainer.distributed.shared_shards import SharedShards
from trainer.distributed.watchdog import CollectiveTracker
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.row_exchange import RowExchange
from trainer.runtime.errors import BadInput

T = TypeVar("T")

#: Least bytes of page-locked memory that are allocated at a time, and the alignment of a shard.
PINNED_BYTES, PINNED_ALIGNMENT = 256 << 20, 64
#: Problems that one error lists.
MAX_PROBLEMS = 10


class ZeroEngine(Protocol):
    """The part of ``deepspeed_engine.Engine`` that sharding uses."""

    tracker: CollectiveTracker
    gathered_bytes: int
    exchanged_bytes: int

    def all_gather(self, value: T) -> list[T]: ...

    def pin_memory(self, tensor: Tensor) -> Tensor: ...

    def set_shard(self, parameter: Any, shard: Tensor, shared: SharedShards | None) -> None: ...


class ShardGroup:
    """The ``RowExchange`` of a shard group. Received bytes are added to the engine's counters."""

    def __init__(self, engine: ZeroEngine, group: Any) -> None:
        self._engine, self._group = engine, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def swap(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        output = rows.new_empty(sum(received), *rows.shape[1:])
        with self._engine.tracker.during("all_to_all of rows"):
            dist.all_to_all_single(output, rows, list(received), list(sent), group=self._group)
        self._count(output.nbytes - output[: received[self.rank]].nbytes)
        return output

    def gather(self, rows: Tensor) -> Tensor:
        output = rows.new_empty(self.ranks * len(rows), *rows.shape[1:])
        with self._engine.tracker.during("all_gather of rows"):
            dist.all_gather_into_tensor(output, rows.contiguous(), group=self._group)
        self._count(output.nbytes - rows.nbytes)
        return output

    def scatter_sum(self, rows: Tensor) -> Tensor:
        output = rows.new_empty(len(rows) // self.ranks, *rows.shape[1:])
        with self._engine.tracker.during("reduce_scatter of rows"):
            dist.reduce_scatter_tensor(output, rows.contiguous(), group=self._group)
        self._count(rows.nbytes - output.nbytes)
        return output

    def sum(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        reduced = values.clone()
        with self._engine.tracker.during("all_reduce over vocabulary shards"):
            dist.all_reduce(reduced, op=operation, group=self._group)
        # A ring all_reduce is a reduce_scatter and an all_gather.
        self._count(2 * values.nbytes * (self.ranks - 1) // self.ranks)
        return reduced

    def _count(self, received_bytes: int) -> None:
        self._engine.gathered_bytes += received_bytes
        self._engine.exchanged_bytes += received_bytes


class PinnedMemory:
    """Page-locked host memory, of which several shards share an allocation.

    torch rounds an allocation up to a power of two (aten/src/ATen/core/CachingHostAllocator.h):
    one for each shard could take twice the memory of the base.
    """

    def __init__(self, pin: Callable[[Tensor], Tensor]) -> None:
        self._pin = pin
        self._unused: list[Tensor] = []  # the end of each allocation

    def take(self, num_bytes: int) -> Tensor:
        """Return a uint8 tensor [num_bytes] with unspecified values."""
        needed = -(-num_bytes // PINNED_ALIGNMENT) * PINNED_ALIGNMENT
        fitting = (i for i, unused in enumerate(self._unused) if len(unused) >= needed)
        index = next(fitting, None)
        if index is None:
            size = max(PINNED_BYTES, 1 << (needed - 1).bit_length())
            self._unused.append(self._pin(torch.empty(size, dtype=torch.uint8)))
            index = -1
        memory, self._unused[index] = self._unused[index].tensor_split([needed])
        return memory[:num_bytes]


class Zero3Sharder:
    """The ``WeightSharder`` of a rank: allocates its shards and registers them with ZeRO-3.

    ``deepspeed.zero.Init`` would take complete tensors and broadcast those of rank 0. Here it only
    converts parameters; their shards are set directly.
    """

    def __init__(
        self, engine: ZeroEngine, zero_init: Any, shared: SharedShards | None = None
    ) -> None:
        """Without ``shared``, shards are in memory of this rank alone."""
        self._engine, self._init, self._shared = engine, zero_init, shared
        self._group = zero_init.ds_process_group
        self._rank, self._ranks = zero_init.rank, zero_init.dp_world_size
        self._pinned = PinnedMemory(engine.pin_memory) if zero_init.pin_memory else None
        self.exchange: RowExchange | None = None
        if self._ranks > 1:
            self.exchange = ShardGroup(engine, self._group)

    def bounds(self, num_elements: int, unit: int = 1) -> tuple[int, int]:
        """See ``WeightSharder``; the last shards may be smaller."""
        size = self._shard_size(num_elements, unit)
        start = min(self._rank * size, num_elements)
        return start, min(start + size, num_elements)

    def allocate(self, num_elements: int, dtype: torch.dtype, unit: int = 1) -> Tensor:
        if self._shared is not None and unit == 1:  # rows of tables are exchanged, not gathered
            return self._shared.allocate(self._shard_size(num_elements, unit), dtype)
        size = self._shard_size(num_elements, unit)
        if self._pinned is not None:
            shard = self._pinned.take(size * dtype.itemsize).view(dtype)
        else:
            shard = torch.empty(size, dtype=dtype, device=str(self._init.remote_device))
        start, stop = self.bounds(num_elements, unit)
        shard[stop - start :].zero_()
        return shard

    def adopt(self, parameter: nn.Parameter, shard: Tensor) -> None:
        """See ``WeightSharder``; the parameter becomes a partitioned ZeRO-3 parameter."""
        device = self._init.local_device
        # A tensor of the parameter's shape without memory. ``.data`` cannot leave meta; swapping
        # keeps the parameter's identity, so that tied weights stay tied.
        expanded = torch.empty((), dtype=shard.dtype, device=device).expand(parameter.shape)
        torch.utils.swap_tensors(parameter, nn.Parameter(expanded, requires_grad=False))
        self._init._convert_to_deepspeed_param(parameter)
        self._engine.set_shard(parameter, shard, self._shared)
        zero: Any = parameter  # has DeepSpeed's attributes from now on
        zero.ds_numel_aligned = shard.numel() * self._ranks
        zero.data = torch.empty(0, dtype=shard.dtype, device=device)

    def finish(self, scales: Sequence[Tensor], problems: Sequence[str]) -> None:
        all_problems = [p for rank in self._engine.all_gather(list(problems)) for p in rank]
        if all_problems:
            raise BadInput(list(dict.fromkeys(all_problems))[:MAX_PROBLEMS])
        if scales:
            flat = torch.cat(list(scales))
            with self._engine.tracker.during("all_reduce of row scales"):
                dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self._group)
            for tensor, complete in zip(scales, flat.split([len(s) for s in scales]), strict=True):
                tensor.copy_(complete)

    def _shard_size(self, num_elements: int, unit: int) -> int:
        return _shard_size(num_elements, self._ranks, unit)


def _shard_size(num_elements: int, ranks: int, unit: int = 1) -> int:
    """Elements of one rank's shard, padded to whole units."""
    return -(-num_elements // (ranks * unit)) * unit


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: members of its outermost lists of modules, which have parameters."""
    layers: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            layers += [layer for layer in child if any(True for _ in layer.parameters())]
        else:
            layers += layers_of(child)
    return layers


def resident_tensors(base: nn.Module) -> Iterator[Tensor]:
    """The tensors of the base that stay on this rank: its shards, scales and other buffers."""
    for parameter in base.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
    yield from base.buffers()


def base_bytes(base: nn.Module) -> int:
    """Bytes of the base that stay on this rank."""
    return sum(tensor.nbytes for tensor in resident_tensors(base))


def expected_base_bytes(model: nn.Module, dtype: torch.dtype, ranks: int) -> int:
    """Return ``base_bytes`` of each of ``ranks`` ranks after loading, from a model on ``meta``."""
    tables = {
        id(module.weight): module.weight.shape[1]
        for module in model.modules()
        if isinstance(module, FrozenEmbedding | FrozenHead)
    }
    shards = sum(
        _shard_size(p.numel(), ranks, tables.get(id(p), 1)) * _itemsize(p, dtype)
        for p in model.parameters()
    )
    return shards + sum(buffer.nbytes for buffer in model.buffers())


def base_size(model: nn.Module, dtype: torch.dtype) -> BaseSize:
    """Sizes of a model on ``meta``, whose floating-point weights are stored in ``dtype``."""

    def num_bytes(parameter: nn.Parameter) -> int:
        return parameter.numel() * _itemsize(parameter, dtype)

    parameters = list(model.parameters())
    modules = list(model.modules())
    (head,) = (module.weight for module in modules if isinstance(module, FrozenHead))
    embeddings = [module.weight for module in modules if isinstance(module, FrozenEmbedding)]
    looked_up = [weight for weight in embeddings if weight is not head]
    units = [[p] for p in parameters if all(p is not table for table in (head, *looked_up))]
    units += [list(layer.parameters()) for layer in layers_of(model)]
    gathered = [*units, [head]]  # the head is gathered if there are many labels
    return BaseSize(
        total_bytes=sum(map(num_bytes, parameters)),
        looked_up_bytes=sum(map(num_bytes, looked_up)),
        layer_bytes=max(sum(map(num_bytes, unit)) for unit in gathered),
        layer_elements=max(sum(parameter.numel() for parameter in unit) for unit in units),
    )


def _itemsize(parameter: nn.Parameter, dtype: torch.dtype) -> int:
    """Bytes per stored element of a parameter on ``meta``."""
    return min(parameter.element_size(), dtype.itemsize)
