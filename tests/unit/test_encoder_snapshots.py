"""Which copy of a text encoder is kept."""

from __future__ import annotations

import json

import torch

from trainer.checkpointing.state_tensors import join_tensors, split_tensors
from trainer.prompts.encoder_snapshots import BestEncoder


def reader(weights: list[float]) -> BestEncoder:
    return BestEncoder(lambda: {"w": torch.tensor(weights[-1])})


def test_the_mean_metric_decides_then_the_mean_loss() -> None:
    weights = [0.0]
    best = reader(weights)
    for step, keys in enumerate(
        [
            {"a": (-0.5, 2.0), "b": (-0.5, 2.0)},
            {"a": (-0.9, 4.0), "b": (-0.3, 4.0)},  # more accurate on average
            {"a": (-0.6, 0.1), "b": (-0.5, 0.1)},  # the lowest loss
            {"a": (-0.6, 3.0), "b": (-0.6, 3.0)},  # as accurate as the best, lower loss
        ],
        1,
    ):
        weights.append(float(step))
        best.update(step, keys)
    state = best.state_dict()
    assert (state["w"], state["step"]) == (4.0, 4)
    again = reader(weights)
    tensors, rest = split_tensors(state)
    again.load_state_dict(join_tensors(tensors, json.loads(json.dumps(rest))))
    assert again.state_dict() == state


def test_a_state_of_a_version_that_ranked_by_loss_is_continued() -> None:
    old = {"step": 3, "loss": 1.5, "losses": {"a": 1.0, "b": 2.0}}
    by_loss = reader([7.0])
    by_loss.load_state_dict({**old, "w": torch.tensor(3.0)})
    by_loss.update(4, {"a": (1.1, 1.1)})
    assert by_loss.state_dict()["w"] == 3.0, "the mean loss is higher than before"
    by_accuracy = reader([7.0])
    by_accuracy.load_state_dict({**old, "w": torch.tensor(3.0)})
    by_accuracy.update(4, {"a": (-0.1, 9.0), "b": (-0.1, 9.0)})
    assert by_accuracy.state_dict()["w"] == 7.0
