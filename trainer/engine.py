"""DeepSpeed, and all that knows there are other ranks. The only importer of deepspeed.

ZeRO-3 without an optimizer (``DeepSpeedZeRoOffload``) shards the frozen base and gathers each layer
where it is needed. Prompts stay outside: they are small, replicated, and their gradients are summed
in one flat all-reduce.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor, nn

from trainer.config import RunConfig, resolve_path
from trainer.errors import BadInput

T = TypeVar("T")

#: Settings whose meaning here is given by the run file: (path in the JSON, run file's setting).
OWNED_BY_RUN_FILE = {
    "optimizer": "prompts[].learning_rate and weight_decay",
    "scheduler": "prompts[].warmup_ratio",
    "train_batch_size": "training.tokens_per_step",
}


def resolve_policy(config: RunConfig, dtype: torch.dtype, hidden_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON with every ``"auto"`` filled in from the run.

    Raises:
        BadInput: with every contradiction between the JSON and the run file, both values named.
    """
    file = config.engine.deepspeed
    path = resolve_path(file)
    try:
        policy: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(
            f"engine.deepspeed: {file!r} is not there; try ds_configs/zero3.json"
        ) from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    problems = [
        f"{file}: {key} contradicts the run file, where {setting} decides; remove it"
        for key, setting in OWNED_BY_RUN_FILE.items()
        if policy.get(key, "auto") != "auto"
    ]
    problems += _precision_problems(policy, dtype, file)
    zero = dict(policy.get("zero_optimization", {}))
    if zero.get("stage") != 3:
        problems.append(
            f"{file}: zero_optimization.stage is {zero.get('stage')}, but only stage 3 shards a "
            "frozen base; set it to 3"
        )
    offload = zero.get("offload_param", {}).get("device", "none")
    if offload not in ("none", "cpu"):
        problems.append(
            f"{file}: offload_param.device {offload!r} is not supported; use none or cpu"
        )
    clipping = policy.get("gradient_clipping", "auto")
    norms = sorted({str(prompt.max_grad_norm) for prompt in config.prompts})
    if clipping != "auto" and norms != [str(float(clipping))]:
        problems.append(
            f"{file}: gradient_clipping is {clipping}, but prompts[].max_grad_norm in the run "
            f'file is {", ".join(norms)}; set it to "auto"'
        )
    if problems:
        raise BadInput(problems)

    # Micro-batches are streams of tokens; DeepSpeed, which steps nothing here, need not know.
    _fill(policy, "train_micro_batch_size_per_gpu", 1)
    _fill(policy, "gradient_accumulation_steps", 1)
    _fill(zero, "stage3_param_persistence_threshold", 10 * hidden_size)
    _fill(zero, "stage3_prefetch_bucket_size", 10 * hidden_size * hidden_size)
    _fill(zero, "stage3_max_live_parameters", 1_000_000_000)
    _fill(zero, "stage3_max_reuse_distance", 1_000_000_000)
    unfilled = [f"zero_optimization.{key}" for key, value in zero.items() if value == "auto"]
    if unfilled:
        raise BadInput(f'{file}: "auto" has no meaning for {", ".join(unfilled)}; give a number')
    policy["zero_optimization"] = zero
    # The loader has already given every parameter its type; DeepSpeed would cast int8 to bf16.
    for key in ("bf16", "fp16", "gradient_clipping", *OWNED_BY_RUN_FILE):
        policy.pop(key, None)
    return policy


def _precision_problems(policy: dict[str, Any], dtype: torch.dtype, file: str) -> list[str]:
    problems = []
    for key, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = policy.get(key, {}).get("enabled", "auto")
        if enabled != "auto" and enabled != (dtype == wanted):
            problems.append(
                f"{file}: {key}.enabled is {str(enabled).lower()}, but the run computes in "
                f'{str(dtype).removeprefix("torch.")} (base.dtype); set it to "auto"'
            )
    return problems


def _fill(section: dict[str, Any], key: str, value: int) -> None:
    if section.get(key, "auto") == "auto":
        section[key] = value


class Engine:
    """This rank's place among the others.

    Attributes:
        gathered_bytes: bytes of base this rank has received into gathered layers so far.
    """

    def __init__(self, timeout_seconds: int) -> None:
        _quiet_deepspeed()
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
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cpu" if on_cpu else accelerator.device_name(self.local_rank))
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
            timeout=timedelta(seconds=timeout_seconds),
            verbose=False,
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.gathered_bytes = 0
        self._count_gathers()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sharder(self, policy: dict[str, Any]) -> Callable[[nn.Module], None]:
        """A function that partitions the parameters of one module over all ranks."""
        first: list[nn.Parameter] = []

        def shard(module: nn.Module) -> None:
            parameters = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
            if not first and parameters:
                deepspeed.zero.Init(module=module, config_dict_or_path=policy)
                first.append(parameters[0])
            elif parameters:
                first[0].convert_to_zero_parameters(param_list=parameters)  # type: ignore[attr-defined]

        return shard

    def attach(self, base: nn.Module, policy: dict[str, Any]) -> nn.Module:
        """Let ZeRO-3 gather and release the sharded base as it runs."""
        engine, *_ = deepspeed.initialize(model=base, config=policy, dist_init_required=False)
        # Called directly: the wrapper of the engine refuses a plain ``loss.backward()``.
        module: nn.Module = engine.module
        return module

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place, in one collective."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. For small plain data."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank. For small plain data and small CPU tensors."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, 0)
        result: T = values[0]
        return result

    def together(self, check: Callable[[], T]) -> T:
        """Run a check on every rank; where any finds bad input, all raise it, in the same words."""
        result: T | None = None
        problems: list[str] = []
        try:
            result = check()
        except BadInput as error:
            problems = error.problems
        found = next((p for p in self.all_gather(problems) if p), None)
        if found is not None:
            raise BadInput(found)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _count_gathers(self) -> None:
        """Count what ZeRO-3 receives: the size of every gathered buffer, less our own share."""
        gather = partition_parameters._dist_allgather_fn

        def counted(input_tensor: Tensor, output_tensor: Tensor, group: Any = None) -> Any:
            received = output_tensor.numel() - input_tensor.numel()
            self.gathered_bytes += received * output_tensor.element_size()
            return gather(input_tensor, output_tensor, group)

        partition_parameters._dist_allgather_fn = counted


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
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _resident(base: nn.Module) -> Iterable[Tensor]:
    for parameter in base.parameters():
        yield getattr(parameter, "ds_tensor", parameter)
    yield from base.buffers()


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """What ``base.dtype`` stands for on this device."""
    if setting != "auto":
        dtype: torch.dtype = getattr(torch, setting)
        return dtype
    has_bf16 = device.type != "cpu" and get_accelerator().is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def _quiet_deepspeed() -> None:
    """DeepSpeed logs every step of its own; only its warnings are for us."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
