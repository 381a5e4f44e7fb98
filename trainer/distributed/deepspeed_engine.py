"""DeepSpeed, which shards the base over the ranks. The only importer of deepspeed.

ZeRO-3 without an optimizer (``DeepSpeedZeRoOffload``) shards the frozen base and gathers each layer
where it is needed. Prompts stay outside: they are small, replicated, and their gradients are summed
in one flat all-reduce.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import RunConfig, parse_bytes
from trainer.distributed.collectives import Ranks
from trainer.distributed.placement import AUTO_SHARE, BaseSize, Placement, place
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.row_exchange import RowExchange
from trainer.runtime.errors import BadInput, PortTaken


@contextmanager
def _import_blocked(library: str) -> Iterator[None]:
    """Make a library that is not imported yet look as if it were not installed."""
    if library in sys.modules:
        yield
        return
    sys.modules[library] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[library]


# DeepSpeed's autotuner (0.19.8) imports mlflow if installed: a second and 100 MB per rank.
with _import_blocked("mlflow"):
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

#: Stands among the modules that use a parameter now, so that DeepSpeed does not release it.
KEPT = -1


class Engine(Ranks):
    """A rank whose base DeepSpeed shards, gathers and releases.

    Attributes:
        gathered_bytes: bytes this rank has received so far for the base: gathered layers, and what
            it exchanged with the ranks that hold a table with it.
        exchanged_bytes: of these, the latter: word embeddings that were looked up and hidden states
            that were sent to the head, with all it took to agree on them.
        kept_bytes: bytes of gathered parameters that stay on this rank until a step ends.
    """

    def __init__(self, timeout_seconds: int) -> None:
        _quiet_deepspeed()
        _leave_shared_memory_alone()
        for name, default in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        }.items():
            os.environ.setdefault(name, default)
        accelerator = get_accelerator()
        on_cpu = accelerator.device_name() == "cpu"
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cpu" if on_cpu else accelerator.device_name(local_rank))
        if not on_cpu:  # before the first collective, which would else meet on one device
            accelerator.set_device(local_rank)
        try:
            deepspeed.init_distributed(
                dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
                timeout=timedelta(seconds=timeout_seconds),
                verbose=False,
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise PortTaken(
                f"port {os.environ['MASTER_PORT']} is used by another process"
            ) from None
        super().__init__(
            dist.get_rank(), dist.get_world_size(), local_rank, device, timeout_seconds
        )
        self.gathered_bytes, self.exchanged_bytes = 0, 0
        self.kept_bytes = 0
        self._kept: list[Any] = []
        self._heads: list[FrozenHead] = []
        self._zero: Any = None
        #: DeepSpeed knows in which order forward and backward of training use what is sharded.
        self._traced = False
        self._group_size = self.world_size
        self._resident, self._peak = 0, 0
        self._count_gathers()

    def place(
        self,
        skeleton: nn.Module,
        config: RunConfig,
        dtype: torch.dtype,
        *,
        offload: bool = False,
        must_fit: bool = False,
    ) -> Placement:
        """Choose the shard group and what stays gathered, alike on all ranks.

        Args:
            must_fit: hold what ``base_memory: auto`` stands for as strictly as a number.

        Raises:
            BadInput: if the group does not divide the ranks, or the base does not fit.
        """
        setting = config.engine.base_memory
        nodes = self.all_gather((_node(), self._free_memory()))
        names = [name for name, _ in nodes]
        shared = self.device.type == "cpu"  # memory that all ranks of a node draw from
        free = min(free // (names.count(name) if shared else 1) for name, free in nodes)
        memory = int(AUTO_SHARE * free) if setting == "auto" else parse_bytes(setting)
        node_sizes = [len(list(ranks)) for _, ranks in itertools.groupby(names)]
        return place(
            base_size(skeleton, dtype),
            config.engine.shard_group,
            memory,
            node_sizes,
            free=free,
            offload=offload,
            exact=must_fit or setting != "auto",
        )

    def sharder(self, policy: dict[str, Any], group_size: int | None = None) -> Zero3Sharder:
        """What builds this rank's shards of the base.

        Args:
            group_size: consecutive ranks that hold one copy together; None for all.
        """
        group = None
        self._group_size = group_size or self.world_size
        if group_size not in (None, self.world_size):
            for first in range(0, self.world_size, group_size):
                members = list(range(first, first + group_size))
                made = dist.new_group(members, timeout=timedelta(seconds=self._timeout))
                group = made if first <= self.rank < first + group_size else group
        return Zero3Sharder(self, policy, group)

    def attach(self, base: nn.Module, policy: dict[str, Any], kept_bytes: int = 0) -> nn.Module:
        """Let ZeRO-3 gather and release the sharded base as it runs.

        Args:
            kept_bytes: of parameters that, once gathered, stay until ``end_step``.
        """
        engine, *_ = deepspeed.initialize(model=base, config=policy, dist_init_required=False)
        self._zero, self._traced = engine.optimizer, False
        self._kept, self.kept_bytes = [], 0
        for parameter in base.parameters():
            zero: Any = parameter
            num_bytes = zero.ds_numel * zero.ds_tensor.element_size()
            if self.kept_bytes + num_bytes <= kept_bytes:
                self.kept_bytes += num_bytes
                zero.ds_active_sub_modules.add(KEPT)
                self._kept.append(zero)
        self._heads = [module for module in base.modules() if isinstance(module, FrozenHead)]
        for head in self._heads:
            head.keeps = self.kept_bytes + head.table_bytes <= kept_bytes
        # Called directly: the wrapper of the engine refuses a plain ``loss.backward()``.
        module: nn.Module = engine.module
        return module

    def release(self, base: nn.Module) -> None:
        """Free this rank's memory of a base that is not used again, so that another can be loaded.

        DeepSpeed refers to every module that it ever ran, in a list and in caches of its own, so
        the memory is taken from under the tensors.
        """
        self.end_step()
        self._kept, self._heads, self.kept_bytes = [], [], 0
        for tensor in [*_resident(base), *base.parameters()]:
            storage = tensor.untyped_storage()
            tensor.data = tensor.data.new_empty(0)
            if storage.resizable():  # a view's base holds it too; pinned memory is not resizable
                storage.resize_(0)
        if self.device.type != "cpu":
            get_accelerator().empty_cache()

    def end_step(self) -> None:
        """Release what was kept gathered; the next step fetches it again, once."""
        for parameter in self._kept:
            if parameter.ds_status == partition_parameters.ZeroParamStatus.AVAILABLE:
                with _released(parameter):
                    parameter.partition()
        for head in self._heads:
            head.release()

    def note_trained_batch(self) -> None:
        """After a forward and backward: what DeepSpeed has seen of them is for the next."""
        self._traced = self._zero.get_param_coordinator().is_complete_trace()

    def recover_from_oom(self) -> bool:
        """After a forward or backward that broke off: let go of what it held, for another try.

        Returns:
            False where no rank may try again alone: others wait in a gather of this packed batch,
            or the next forward will be compared between ranks.
        """
        coordinator = self._zero.get_param_coordinator()
        traced = self.world_size == 1 or (self._traced and coordinator.is_complete_trace())
        if self._group_size > 1 or not traced:
            return False
        del parameter_offload.FWD_MODULE_STACK[1:]  # all but the root, which never leaves it
        coordinator.reset_step()
        coordinator.release_backward_leftovers()
        coordinator.release_and_reset_all(self._zero.module)
        for parameter in self._kept:
            parameter.ds_active_sub_modules.add(KEPT)
        if self.device.type != "cpu":
            get_accelerator().empty_cache()
        return True

    def reset_peak_memory(self) -> None:
        """Reset ``peak_activation_bytes``."""
        if self.device.type != "cpu":
            self._peak = self.peak_gpu_bytes
            get_accelerator().reset_peak_memory_stats(self.local_rank)
            self._resident = get_accelerator().memory_allocated(self.local_rank)

    def peak_activation_bytes(self) -> int:
        """The most that was taken of this rank's GPU at a time since ``reset_peak_memory``.

        Beyond what was taken then and what stays gathered; 0 on CPU.
        """
        if self.device.type == "cpu":
            return 0
        peak = int(get_accelerator().max_memory_allocated(self.local_rank))
        return max(0, peak - self._resident - self.kept_bytes)

    @property
    def peak_gpu_bytes(self) -> int:
        """Of the whole run; 0 on CPU."""
        if self.device.type == "cpu":
            return 0
        return max(self._peak, int(get_accelerator().max_memory_allocated(self.local_rank)))

    def _free_memory(self) -> int:
        """Bytes free on this rank's device; on CPU of the whole node."""
        if self.device.type == "cpu":
            return int(psutil.virtual_memory().available)
        return int(get_accelerator().available_memory(self.local_rank))

    def _count_gathers(self) -> None:
        """Count what ZeRO-3 receives: the size of every gathered buffer, less our own share."""
        gather = partition_parameters._dist_allgather_fn

        def counted(input_tensor: Tensor, output_tensor: Tensor, group: Any = None) -> Any:
            self.pulse.at("the gathering of a layer")
            received = output_tensor.numel() - input_tensor.numel()
            self.gathered_bytes += received * output_tensor.element_size()
            return gather(input_tensor, output_tensor, group)

        partition_parameters._dist_allgather_fn = counted


class GroupRows:
    """The ``RowExchange`` of a shard group; what a rank receives counts as gathered."""

    def __init__(self, engine: Engine, group: Any) -> None:
        self._engine, self._group = engine, group
        self._pulse = engine.pulse
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def swap(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        taken = rows.new_empty(sum(received), *rows.shape[1:])
        with self._pulse.within("a swap of rows"):
            dist.all_to_all_single(taken, rows, list(received), list(sent), group=self._group)
        self._received(taken.nbytes - taken[: received[self.rank]].nbytes)
        return taken

    def gather(self, rows: Tensor) -> Tensor:
        whole = rows.new_empty(self.ranks * len(rows), *rows.shape[1:])
        with self._pulse.within("the gathering of rows"):
            dist.all_gather_into_tensor(whole, rows.contiguous(), group=self._group)
        self._received(whole.nbytes - rows.nbytes)
        return whole

    def scatter_sum(self, rows: Tensor) -> Tensor:
        own = rows.new_empty(len(rows) // self.ranks, *rows.shape[1:])
        with self._pulse.within("the scattered sum of rows"):
            dist.reduce_scatter_tensor(own, rows.contiguous(), group=self._group)
        self._received(rows.nbytes - own.nbytes)
        return own

    def sum(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        reduced = values.clone()
        with self._pulse.within("a reduction over the head"):
            dist.all_reduce(reduced, op=operation, group=self._group)
        # As a ring does it: parts are reduced on the way round, then sent round once more.
        self._received(2 * values.nbytes * (self.ranks - 1) // self.ranks)
        return reduced

    def _received(self, num_bytes: int) -> None:
        self._engine.gathered_bytes += num_bytes
        self._engine.exchanged_bytes += num_bytes


class Zero3Sharder:
    """Builds the shards that ZeRO-3 works on, each from what this rank alone has read.

    ``deepspeed.zero.Init`` would take whole tensors and send rank 0's to everyone. Its bookkeeping
    is kept; the partition is put in its place directly.

    Attributes:
        exchange: swaps rows within the shard group; None in a group of one.
    """

    def __init__(self, engine: Engine, policy: dict[str, Any], group: Any) -> None:
        self._engine = engine
        self._init = deepspeed.zero.Init(
            module=nn.Module(), config_dict_or_path=policy, data_parallel_group=group
        )
        self._group = self._init.ds_process_group
        self._rank, self._ranks = self._init.rank, self._init.dp_world_size
        self.exchange: RowExchange | None = None
        if self._ranks > 1:
            self.exchange = GroupRows(engine, self._group)

    def bounds(self, num_elements: int, unit: int = 1) -> tuple[int, int]:
        """Start and stop of this rank's part of a flat tensor; the last ranks may have less.

        Args:
            unit: elements that stay together.
        """
        size = self._size(num_elements, unit)
        start = min(self._rank * size, num_elements)
        return start, min(start + size, num_elements)

    def allocate(self, num_elements: int, dtype: torch.dtype, unit: int = 1) -> Tensor:
        """Memory for this rank's part of a flat tensor, padding included, zeroed."""
        device = str(self._init.remote_device)
        shard = torch.zeros(self._size(num_elements, unit), dtype=dtype, device=device)
        if self._init.pin_memory:
            shard = get_accelerator().pin_memory(shard)
        return shard

    def adopt(self, parameter: nn.Parameter, shard: Tensor) -> None:
        """Turn a parameter on ``meta`` into one of which this rank holds ``shard``."""
        device = self._init.local_device
        # Has the shape, but no memory. ``.data`` cannot leave meta; swapping keeps the identity,
        # so that tied weights stay tied.
        hollow = torch.empty((), dtype=shard.dtype, device=device).expand(parameter.shape)
        torch.utils.swap_tensors(parameter, nn.Parameter(hollow, requires_grad=False))
        self._init._convert_to_deepspeed_param(parameter)
        zero: Any = parameter  # has DeepSpeed's attributes from now on
        zero.ds_tensor = shard
        zero.ds_tensor.ds_numel = shard.numel()
        zero.ds_tensor.status = partition_parameters.PartitionedParamStatus.AVAILABLE
        zero.ds_tensor.final_location = None
        zero.ds_numel_aligned = shard.numel() * self._ranks
        zero.data = torch.empty(0, dtype=shard.dtype, device=device)
        zero.ds_status = partition_parameters.ZeroParamStatus.NOT_AVAILABLE

    def finish(self, scales: Sequence[Tensor], problems: Sequence[str]) -> None:
        """Raise any rank's problems on all; complete the scales, which are zero where not read."""
        found = [p for rank in self._engine.all_gather(list(problems)) for p in rank]
        if found:
            raise BadInput(list(dict.fromkeys(found))[:10])
        if scales:
            flat = torch.cat(list(scales))
            with self._engine.pulse.within("the scales of the base"):
                dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self._group)
            for tensor, whole in zip(scales, flat.split([len(s) for s in scales]), strict=True):
                tensor.copy_(whole)

    def _size(self, num_elements: int, unit: int) -> int:
        return -(-num_elements // (self._ranks * unit)) * unit


def base_bytes(base: nn.Module) -> int:
    """Bytes of the base that stay on this rank: its shards, scales and other buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _resident(base))


def base_digest(base: nn.Module) -> str:
    """SHA-256 over what this rank holds of the base: two equal digests, two equal bases."""
    digest = hashlib.sha256()
    for tensor in _resident(base):
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """A copy of a sharded parameter in full; every rank must call it."""
    with _released(parameter), deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def base_size(skeleton: nn.Module, dtype: torch.dtype) -> BaseSize:
    """Sizes of a model on ``meta``, stored in ``dtype`` where it is not quantised."""

    def num_bytes(parameter: nn.Parameter) -> int:
        return parameter.numel() * min(parameter.element_size(), dtype.itemsize)

    whole = list(skeleton.parameters())
    tables = {
        type(module): module.weight
        for module in skeleton.modules()
        if isinstance(module, FrozenEmbedding | FrozenHead)
    }
    words, head = tables[FrozenEmbedding], tables[FrozenHead]
    units = [[p] for p in whole if p is not words and p is not head]
    for module in skeleton.modules():
        if isinstance(module, nn.ModuleList):
            units += [list(layer.parameters()) for layer in module]
    gathered = [*units, [head]]  # the head where labels are many
    return BaseSize(
        total_bytes=sum(map(num_bytes, whole)),
        looked_up_bytes=0 if words is head else num_bytes(words),
        layer_bytes=max(sum(map(num_bytes, unit)) for unit in gathered),
        layer_elements=max(sum(parameter.numel() for parameter in unit) for unit in units),
    )


@contextmanager
def _released(parameter: Any) -> Iterator[None]:
    """Inside, nothing uses the parameter, so that it may be partitioned."""
    users = set(parameter.ds_active_sub_modules)
    parameter.ds_active_sub_modules.clear()
    try:
        yield
    finally:
        parameter.ds_active_sub_modules.update(users & {KEPT})


def _node() -> str:
    """The node this rank is on: as the launcher counts them, else by name."""
    return os.environ.get("CROSS_RANK") or os.environ.get("GROUP_RANK") or socket.gethostname()


def _resident(base: nn.Module) -> Iterable[Tensor]:
    for parameter in base.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
    yield from base.buffers()


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """What ``base.dtype`` stands for on this device."""
    if setting != "auto":
        dtype: torch.dtype = getattr(torch, setting)
        return dtype
    if device.type == "cuda":  # DeepSpeed also counts what is emulated, slowly
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type != "cpu" and get_accelerator().is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def _quiet_deepspeed() -> None:
    """DeepSpeed logs every step of its own; only its warnings are for us."""
    deepspeed.utils.logger.setLevel(logging.WARNING)


def _leave_shared_memory_alone() -> None:
    """Keep DeepSpeed (0.19.8) from compiling a C++ all-reduce for CPU and filling /dev/shm for it.

    Only ``inference_all_reduce`` uses it, which is never called here. Each rank would write a file
    of 69 MB there, which does not fit in many containers and stays behind when the run has ended.
    """
    # By name: the package has an attribute ``torch`` that is PyTorch.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
