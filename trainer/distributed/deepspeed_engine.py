"""DeepSpeed ZeRO-3, which shards the base over the ranks. The only importer of deepspeed.

ZeRO-3 without an optimizer (``DeepSpeedZeRoOffload``) gathers each layer of the frozen base in
forward and backward. Prompts are not sharded but replicated, because they are small; their
gradients are summed in one all-reduce.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import RunConfig, parse_bytes
from trainer.distributed.collectives import Ranks
from trainer.distributed.placement import AUTO_SHARE, Placement, place
from trainer.distributed.shared_shards import SharedShards
from trainer.distributed.zero3_sharder import (
    Zero3Sharder,
    base_size,
    layers_of,
    resident_tensors,
)
from trainer.model.layers.lm_head import FrozenHead
from trainer.runtime.errors import PortTaken
from trainer.runtime.limits import free_memory
from trainer.runtime.process import hidden

# DeepSpeed's autotuner (0.19.8) imports mlflow if installed: a second and 100 MB per rank.
with hidden("mlflow"):
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import (
        parameter_offload,
        partition_parameters,
        partitioned_param_coordinator,
    )

#: Module id in ``ds_active_sub_modules`` that keeps DeepSpeed from releasing a parameter.
KEPT = -1
#: Attribute of a layer with its parameters and their names.
LISTED = "listed_parameters"


class Engine(Ranks):
    """A rank whose base is sharded, gathered and released by DeepSpeed.

    Attributes:
        gathered_bytes: bytes received so far for the base: gathered layers and exchanged rows.
        exchanged_bytes: the part of ``gathered_bytes`` exchanged within the shard group: embeddings
            and their ids, hidden states sent to the head, or the head itself.
        kept_bytes: bytes of gathered parameters that stay on this rank until a step ends.
    """

    def __init__(self, timeout_seconds: int) -> None:
        deepspeed.utils.logger.setLevel(logging.WARNING)
        _disable_shared_memory_op()
        _quicken_hooks()
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
        if not on_cpu and not accelerator.is_available():
            raise RuntimeError(_unusable_gpu())
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cpu" if on_cpu else accelerator.device_name(local_rank))
        if not on_cpu:  # before the first collective, which would use device 0 on all ranks
            accelerator.set_device(local_rank)
        backend = "gloo" if on_cpu else accelerator.communication_backend_name()
        timeout = timedelta(seconds=timeout_seconds)
        if os.environ["WORLD_SIZE"] == "1" and not dist.is_initialized():
            # In memory: needs no port, which another process may use.
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        try:
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise PortTaken(
                f"port {os.environ['MASTER_PORT']} is used by another process"
            ) from None
        super().__init__(
            dist.get_rank(), dist.get_world_size(), local_rank, device, timeout_seconds
        )
        self.gathered_bytes = self.exchanged_bytes = self.kept_bytes = 0
        self._kept: list[Any] = []
        self._heads: list[FrozenHead] = []
        self._zero: Any = None
        #: Whether DeepSpeed has recorded the parameters' order in a training forward and backward.
        self._traced = False
        self._group_size = self.world_size
        self._resident, self._peak, self._live_bytes = 0, 0, 0
        self._count_gathers()

    def place(
        self,
        model: nn.Module,
        config: RunConfig,
        dtype: torch.dtype,
        *,
        offload: bool = False,
        must_fit: bool = False,
    ) -> Placement:
        """Call ``placement.place`` with the memory and nodes of all ranks, which get equal results.

        Args:
            must_fit: refuse a base that does not fit even if ``base_memory`` is auto.
        """
        setting = config.engine.base_memory
        # Identify the node by the launcher's index, else by the host name.
        node = os.environ.get("CROSS_RANK") or os.environ.get("GROUP_RANK") or socket.gethostname()
        nodes = self.all_gather((node, self._free_memory()))
        names = [name for name, _ in nodes]
        shared = self.device.type == "cpu"  # all ranks of a node share its memory
        free = min(free // (names.count(name) if shared else 1) for name, free in nodes)
        memory = int(AUTO_SHARE * free) if setting == "auto" else parse_bytes(setting)
        node_sizes = [len(list(ranks)) for _, ranks in itertools.groupby(names)]
        placement = place(
            base_size(model, dtype),
            config.engine.shard_group,
            memory,
            node_sizes,
            free=free,
            offload=offload,
            exact=must_fit or setting != "auto",
            flexible=setting == "auto" and not offload,
            hard_limit=self.device.type != "cpu",
        )
        gathers = placement.group_size > 1 or offload
        self._live_bytes = placement.policy["stage3_max_live_parameters"] if gathers else 0
        return placement

    def sharder(
        self,
        policy: dict[str, Any],
        group_size: int | None = None,
        *,
        share_memory: bool = False,
    ) -> Zero3Sharder:
        """Return the object that builds this rank's shards of the base.

        Args:
            group_size: number of consecutive ranks that hold one copy; None for all ranks.
            share_memory: on a CPU, hold the shards in shared memory if all ranks of every group
                can read it, and gather by copies from there.
        """
        group = shared = None
        self._group_size = group_size or self.world_size
        if group_size not in (None, self.world_size):
            for first in range(0, self.world_size, group_size):
                members = list(range(first, first + group_size))
                new_group = dist.new_group(members, timeout=timedelta(seconds=self._timeout))
                group = new_group if first <= self.rank < first + group_size else group
        zero_init = deepspeed.zero.Init(
            module=nn.Module(), config_dict_or_path=policy, data_parallel_group=group
        )
        if share_memory and self.device.type == "cpu" and self._group_size > 1:
            first = self.rank - self.rank % self._group_size
            ranks = range(first, first + self._group_size)
            shared = SharedShards.open(self.rank, ranks, self.all_gather)
        return Zero3Sharder(self, zero_init, shared)

    def pin_memory(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to page-locked host memory."""
        pinned: Tensor = get_accelerator().pin_memory(tensor)
        return pinned

    def set_shard(self, parameter: Any, shard: Tensor, shared: SharedShards | None = None) -> None:
        """Mark a converted parameter as partitioned, with ``shard`` as this rank's part.

        Args:
            shared: holds the shard, and gathers the parameter instead of DeepSpeed.
        """
        parameter.shared_shards = shared
        if shared is not None:
            parameter.all_gather_coalesced = self._gather_shared
        parameter.ds_tensor = shard
        parameter.ds_tensor.ds_numel = shard.numel()
        parameter.ds_tensor.status = partition_parameters.PartitionedParamStatus.AVAILABLE
        parameter.ds_tensor.final_location = None
        parameter.ds_status = partition_parameters.ZeroParamStatus.NOT_AVAILABLE

    def _gather_shared(self, parameters: Iterable[Any], **_: object) -> _SharedGather:
        """Replacement of DeepSpeed's ``all_gather_coalesced`` for shards in shared memory."""
        return _SharedGather(self, list(parameters))

    def attach(
        self,
        base: nn.Module,
        policy: dict[str, Any],
        kept_bytes: int = 0,
        *,
        only_inference: bool = False,
    ) -> nn.Module:
        """Install ZeRO-3's hooks, which gather and release the parameters of a sharded base.

        A layer is a leaf module of ZeRO-3: its parameters are gathered and released together, and
        the modules inside it have no hooks.

        Args:
            kept_bytes: maximum bytes of gathered parameters that stay here until ``end_step``.
            only_inference: the base is used without gradients. If all of it may stay gathered, it
                is gathered now, without hooks: in a decode step they take longer than the products.
        """
        self._kept, self.kept_bytes = [], 0
        module = base
        if not (only_inference and self._gather_all(base, kept_bytes)):
            module = self._install_hooks(base, policy, kept_bytes)
        self._heads = [module for module in base.modules() if isinstance(module, FrozenHead)]
        for head in self._heads:
            head.keeps = self.kept_bytes + head.table_bytes <= kept_bytes
        return module

    def _gather_all(self, base: nn.Module, kept_bytes: int) -> bool:
        """Gather all parameters for good, if they fit; a complete shard on the device is a view."""
        parameters: list[Any] = list(base.parameters())
        if any(p.ds_tensor.device.type != self.device.type for p in parameters):
            return False
        if self._group_size > 1:
            num_bytes = sum(p.ds_numel * p.ds_tensor.element_size() for p in parameters)
            if num_bytes > kept_bytes:
                return False
            self.kept_bytes = num_bytes
        for parameter in parameters:  # together they would be copied once more
            parameter.all_gather_coalesced([parameter]).wait()
        return True

    def _install_hooks(self, base: nn.Module, policy: dict[str, Any], kept_bytes: int) -> nn.Module:
        for layer in layers_of(base):
            deepspeed.utils.set_z3_leaf_module(layer, True)
            layer.__dict__[LISTED] = tuple(layer.named_parameters())
        engine, *_ = deepspeed.initialize(model=base, config=policy, dist_init_required=False)
        self._zero, self._traced = engine.optimizer, False
        for parameter in base.parameters():
            zero: Any = parameter
            num_bytes = zero.ds_numel * zero.ds_tensor.element_size()
            if self.kept_bytes + num_bytes <= kept_bytes:
                self.kept_bytes += num_bytes
                zero.ds_active_sub_modules.add(KEPT)
                self._kept.append(zero)
        # Returned without the engine's wrapper, which refuses a plain ``loss.backward()``.
        module: nn.Module = engine.module
        module.register_forward_pre_hook(self._exclude_kept)
        module.register_forward_hook(self._check_trace)
        return module

    def _exclude_kept(self, *_: object) -> None:
        """Before a forward, exclude kept parameters from DeepSpeed's count of live parameters.

        DeepSpeed has just set the count to 0 and adds parameters as it gathers them. The policy's
        limit is for the other parameters.
        """
        available = partition_parameters.ZeroParamStatus.AVAILABLE
        to_gather = sum(p.ds_numel for p in self._kept if p.ds_status != available)
        coordinator = self._zero.get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__n_available_params -= to_gather

    def _check_trace(self, *_: object) -> None:
        """After a forward, note whether DeepSpeed still has the trace of training.

        A forward in another order, such as a decoding step, discards the trace. The next forward
        without gradient is then recorded as a complete trace, without the order in backward.
        """
        self._traced = self._traced and self._zero.get_param_coordinator().is_complete_trace()

    def release(self, base: nn.Module) -> None:
        """Free this rank's memory of a base that is not used again.

        DeepSpeed keeps references to every module it has run, in a list and in caches, so the
        storage of the tensors is freed instead.
        """
        self.end_step()
        self._kept, self._heads, self.kept_bytes = [], [], 0
        parameters: list[Any] = list(base.parameters())
        for shared in {p.shared_shards for p in parameters} - {None}:
            shared.close()
        for tensor in [*resident_tensors(base), *parameters]:
            storage = tensor.untyped_storage()
            tensor.data = tensor.data.new_empty(0)
            if storage.resizable():  # views share it; pinned or shared memory is not resizable
                storage.resize_(0)
        if self.device.type != "cpu":
            get_accelerator().empty_cache()

    def end_step(self) -> None:
        """Release the parameters that were kept gathered during a step."""
        for parameter in self._kept:
            if parameter.ds_status == partition_parameters.ZeroParamStatus.AVAILABLE:
                parameter.ds_active_sub_modules.clear()
                parameter.partition()
                parameter.ds_active_sub_modules.add(KEPT)
        for head in self._heads:
            head.release()

    def note_trained_batch(self) -> None:
        """After a training forward and backward, note whether DeepSpeed has a complete trace."""
        self._traced = self._zero.get_param_coordinator().is_complete_trace()

    def recover_from_oom(self) -> bool:
        """Release everything held by a forward or backward that ran out of memory.

        Returns:
            False if this rank cannot repeat the pass alone: other ranks wait in its all-gathers, or
            DeepSpeed would compare the order of parameters between ranks in the next forward.
        """
        coordinator = self._zero.get_param_coordinator()
        traced = self.world_size == 1 or (self._traced and coordinator.is_complete_trace())
        if self._group_size > 1 or not traced:
            return False
        del parameter_offload.FWD_MODULE_STACK[1:]  # the root module stays on the stack
        for parameter in self._zero.module.parameters():
            zero: Any = parameter
            # Memory ran out while offloaded shards were copied to the device.
            began = zero.ds_status == partition_parameters.ZeroParamStatus.INFLIGHT
            if began and zero not in self._zero.module.ds_inflight_param_registry:
                zero.ds_active_sub_modules.clear()
                partition_parameters.free_param(zero)
        coordinator.reset_step()
        coordinator.release_backward_leftovers()
        coordinator.release_and_reset_all(self._zero.module)
        for parameter in self._kept:
            parameter.ds_active_sub_modules.add(KEPT)
        if self.device.type != "cpu":
            get_accelerator().empty_cache()
        return True

    def reset_peak_memory(self) -> None:
        """Start a new measurement of ``peak_activation_bytes``."""
        if self.device.type != "cpu":
            self._peak = self.peak_gpu_bytes
            get_accelerator().reset_peak_memory_stats(self.local_rank)
            self._resident = get_accelerator().memory_allocated(self.local_rank)

    def peak_activation_bytes(self) -> int:
        """Peak GPU memory since ``reset_peak_memory``; 0 on CPU.

        Excludes memory that was allocated at that call, and gathered parameters: those that stay,
        and the layers that are gathered at a time, at least one byte per element.
        """
        if self.device.type == "cpu":
            return 0
        peak = int(get_accelerator().max_memory_allocated(self.local_rank))
        return max(0, peak - self._resident - self.kept_bytes - self._live_bytes)

    @property
    def peak_gpu_bytes(self) -> int:
        """Peak GPU memory of the process; 0 on CPU."""
        if self.device.type == "cpu":
            return 0
        return max(self._peak, int(get_accelerator().max_memory_allocated(self.local_rank)))

    def _free_memory(self) -> int:
        """Free bytes of this rank's device; on CPU, of the node."""
        if self.device.type == "cpu":
            return free_memory()
        if self.device.type == "cuda":
            # DeepSpeed (0.19.8) cannot read UUIDs in CUDA_VISIBLE_DEVICES, and without pynvml it
            # counts as free what other processes and the CUDA context use.
            cached = torch.cuda.memory_reserved(self.device)
            cached -= torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + cached
        return int(get_accelerator().available_memory(self.local_rank))

    def _count_gathers(self) -> None:
        """Wrap ZeRO-3's all_gather to count received bytes, which exclude this rank's shard."""
        gather = partition_parameters._dist_allgather_fn

        def counted(input_tensor: Tensor, output_tensor: Tensor, group: Any = None) -> Any:
            self.tracker.begin("all_gather of base weights")
            received = output_tensor.numel() - input_tensor.numel()
            self.gathered_bytes += received * output_tensor.element_size()
            return gather(input_tensor, output_tensor, group)

        partition_parameters._dist_allgather_fn = counted


class _SharedGather:
    """Handle of parameters whose shards are in shared memory, as ``AllGatherCoalescedHandle``.

    They are copied when the handle is waited for: earlier copies would not overlap with products,
    which use the same core, and would take memory for longer.
    """

    def __init__(self, engine: Engine, parameters: Sequence[Any]) -> None:
        self._engine, self._parameters = engine, parameters
        for parameter in parameters:
            if parameter.ds_status != partition_parameters.ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(parameter.ds_summary())
            parameter.ds_status = partition_parameters.ZeroParamStatus.INFLIGHT

    def wait(self, handle_dependency: bool = True) -> None:
        if self._parameters:
            self._engine.tracker.begin("gather of base weights from shared memory")
        for parameter in self._parameters:
            shard = parameter.ds_tensor
            flat = parameter.shared_shards.gather(shard)
            parameter.data = flat[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
            self._engine.gathered_bytes += flat.nbytes - shard.nbytes
        self._parameters = ()


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Resolve ``base.dtype`` for a device: ``auto`` is bfloat16 where the hardware supports it."""
    if setting != "auto":
        dtype: torch.dtype = getattr(torch, setting)
        return dtype
    if device.type == "cuda":  # DeepSpeed's own check accepts slow emulation
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type != "cpu" and get_accelerator().is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def _unusable_gpu() -> str:
    """Why torch cannot use the GPU that the launcher has found, and what to do."""
    cuda = torch.version.cuda
    reason = f"it needs a driver for CUDA {cuda}" if cuda else "it is built without CUDA"
    return (
        f"torch {torch.__version__} cannot use the GPUs of {socket.gethostname()}: {reason} "
        "(`nvidia-smi` shows what the driver supports); install a build of torch for this driver, "
        "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
    )


def device_name(device: torch.device) -> str:
    """Name of a GPU as its driver reports it; of other devices, the type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _disable_shared_memory_op() -> None:
    """Keep DeepSpeed (0.19.8) from compiling a C++ all-reduce for CPU and filling /dev/shm for it.

    Only ``inference_all_reduce`` uses it, which is never called here. Each rank would write 69 MB
    to /dev/shm, which exceeds the limit of many containers and is not deleted at exit.
    """
    # By name, because the attribute ``deepspeed.comm.torch`` is PyTorch.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


@cache
def _quicken_hooks() -> None:
    """Keep DeepSpeed (0.19.8) from work that it repeats in the hooks of every layer.

    They list the parameters of a layer several times per forward and backward, although those of a
    frozen base stay the same, and make messages that are not printed.
    """
    coordinator: Any = partitioned_param_coordinator
    list_anew = coordinator.get_all_parameters

    def listed(module: Any, recurse: bool = False) -> Any:
        parameters = module.__dict__.get(LISTED)
        if parameters is None:
            return list_anew(module, recurse)
        return itertools.chain(parameters, module.ds_external_parameters())

    coordinator.get_all_parameters = listed
    partition_parameters.print_rank_0 = lambda *_, **__: None
