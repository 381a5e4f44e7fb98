"""The DeepSpeed configuration of a run: its JSON file with every ``"auto"`` filled in."""

from __future__ import annotations

import json
from typing import Any

import torch

from trainer.config import RunConfig, resolve_path
from trainer.distributed.placement import Placement
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

#: Keys of zero_optimization that apply to a frozen base.
ZERO_KEYS = {
    "stage",
    "offload_param",
    "overlap_comm",
    "contiguous_gradients",
    "allgather_sequential",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
}


def _run_file_settings(run: RunConfig) -> dict[str, str]:
    """Keys of the JSON that the run file determines, each with the setting and its value."""

    def each(setting: str) -> str:
        return ", ".join(sorted({str(getattr(prompt, setting)) for prompt in run.prompts}))

    micro_batch = f"training.micro_batch_tokens={run.training.micro_batch_tokens}"
    return {
        "optimizer": f"prompts[].learning_rate={each('rate_in_words')} with {each('optimizer')}",
        "scheduler": f"prompts[].warmup_ratio={each('warmup_ratio')}, then {each('schedule')}",
        "train_batch_size": f"training.tokens_per_step={run.training.tokens_per_step}",
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batch,
        "gradient_clipping": f"prompts[].max_grad_norm={each('max_grad_norm')}",
        "activation_checkpointing": (
            f"engine.gradient_checkpointing={run.engine.gradient_checkpointing}"
        ),
    }


def resolve_policy(
    config: RunConfig, dtype: torch.dtype, hidden_size: int, placement: Placement | None = None
) -> dict[str, Any]:
    """Return the DeepSpeed JSON with every ``"auto"`` filled in from the run.

    Args:
        placement: sets the memory limits; None: DeepSpeed's defaults.

    Raises:
        BadInput: with every contradiction between the JSON and the run file, and every setting of
            the JSON that is not supported.
    """
    file = config.engine.deepspeed
    path = resolve_path(file)
    if not path.is_file():
        raise BadInput(f"engine.deepspeed: {file!r} does not exist; try ds_configs/zero3.json")
    policy = read_json_object(path)
    owned = _run_file_settings(config)
    problems = [
        f"{file}: {key} is {json.dumps(policy[key])}, but the run file sets it: {setting}; "
        'set it to "auto"'
        for key, setting in owned.items()
        if policy.get(key, "auto") != "auto"
    ]
    for key, enabled_for in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = policy.get(key, {}).get("enabled", "auto")
        if enabled != "auto" and enabled != (dtype == enabled_for):
            problems.append(
                f"{file}: {key}.enabled is {str(enabled).lower()}, but the run computes in "
                f'{str(dtype).removeprefix("torch.")} (base.dtype); set it to "auto"'
            )
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
    problems += [
        f"{file}: zero_optimization.{key} is not supported for a frozen base; remove it"
        for key in sorted(zero.keys() - ZERO_KEYS)
    ]
    if problems:
        raise BadInput(problems)

    defaults = {
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_prefetch_bucket_size": 10 * hidden_size * hidden_size,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    }
    defaults |= placement.policy if placement else {}
    zero |= {key: n for key, n in defaults.items() if zero.get(key, "auto") == "auto"}
    unfilled = [f"zero_optimization.{key}" for key, value in zero.items() if value == "auto"]
    if unfilled:
        raise BadInput(f'{file}: "auto" is not supported for {", ".join(unfilled)}; set a number')
    policy["zero_optimization"] = zero
    # Parameters already have their types; DeepSpeed would cast int8 to bf16.
    for key in ("bf16", "fp16", *owned):
        policy.pop(key, None)
    # Required by DeepSpeed, which performs no optimizer step here.
    policy |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    return policy
