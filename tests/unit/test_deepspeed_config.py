"""DeepSpeed policies: "auto" is filled in, and what contradicts the run file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import RunConfig
from trainer.distributed.deepspeed_config import resolve_policy
from trainer.runtime.errors import BadInput


def run(policy: Path | str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": "-"},
            "engine": {"deepspeed": str(policy)},
            "tasks": [{"name": "t", "train": "-", "input": "{a}", "target": "{b}"}],
            "prompts": [{"name": "p", "task": "t", "learning_rate": 0.25}],
            "training": {"steps": 1, "tokens_per_step": 77},
        }
    )


def resolve(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "policy.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | changes))
    return resolve_policy(run(path), torch.float32, hidden_size=64)


@pytest.mark.parametrize("name", ["zero3", "zero3_offload_cpu"])
def test_shipped_policies_resolve(name: str) -> None:
    policy = resolve_policy(run(f"ds_configs/{name}.json"), torch.float32, hidden_size=64)
    assert "auto" not in json.dumps(policy)
    assert policy["zero_optimization"]["stage"] == 3
    assert "bf16" not in policy


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"train_batch_size": 32}, ["32", "training.tokens_per_step=77"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["4", "training.micro_batch_tokens=auto"]),
        ({"gradient_accumulation_steps": 8}, ["8", "training.micro_batch_tokens=auto"]),
        ({"gradient_clipping": 0.5}, ["0.5", "prompts[].max_grad_norm=1.0"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "prompts[].learning_rate=0.25"]),
        ({"bf16": {"enabled": True}}, ["true", "float32"]),
        ({"zero_optimization": {"stage": 2}}, ["stage is 2", "set it to 3"]),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            ["zero_quantized_weights is not supported"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["'nvme' is not supported"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictions_name_both_values(
    tmp_path: Path, changes: dict[str, Any], both: list[str]
) -> None:
    with pytest.raises(BadInput) as error:
        resolve(tmp_path, **changes)
    assert all(text in str(error.value) for text in both), str(error.value)


def test_all_contradictions_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        resolve(tmp_path, train_batch_size=1, gradient_clipping=9)
    assert len(error.value.problems) == 2
