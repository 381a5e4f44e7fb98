"""A state's tensors and its JSON are separated and joined without loss."""

from __future__ import annotations

import json
from typing import Any

import torch

from trainer.checkpointing.state_tensors import join_tensors, split_tensors


def test_a_state_is_the_same_after_a_checkpoint() -> None:
    value = torch.ones(2)
    state: dict[str, Any] = {
        "mlp": {
            "encoder": "mlp",  # JSON and the beginning of a tensor's name
            "encoder/weight": value,
            "optimizer": {"updates": 3, "other/weight/exp_avg": value},
            "best": value,
            "reader": {"keys": {}, "best": [0.5, 1.0]},
        }
    }
    tensors, rest = split_tensors(state)
    assert sorted(tensors) == [
        "mlp/best",
        "mlp/encoder/weight",
        "mlp/optimizer/other/weight/exp_avg",
    ]
    assert join_tensors(tensors, json.loads(json.dumps(rest))) == state
