"""The last layer's MLP computes the positions that predict labels, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import CASES
from trainer.data.token_table import Example
from trainer.model.decode_step import DecodeStep
from trainer.model.families import layer_sizes
from trainer.model.layers.end_layers import OnlyRead
from trainer.model.prompted_model import PromptedBase
from trainer.packing.packed_batch import PackedBatch, build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import VirtualTokens

VIRTUAL = 5
#: Tokens of a row, and the first that is a label: rows without text are predicted by the prompt.
ROWS = [(9, 7), (3, 0), (12, 11), (2, 0)]


def batch_of(rows: list[tuple[int, int]]) -> PackedBatch:
    packed = [
        PackedRow(Example.with_target(tuple(range(3, 3 + n)), first, i), 0, i)
        for i, (n, first) in enumerate(rows)
    ]
    return build_packed_batch(packed, [VIRTUAL])


def last_layer_mlp(base: PromptedBase) -> Any:
    return base.model.base_model.layers[-1].mlp


def losses_and_gradient(base: PromptedBase) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    leaf = torch.randn(VIRTUAL, base.hidden_size, requires_grad=True)
    result = base(batch_of(ROWS), [VirtualTokens(leaf)]).losses
    assert result is not None
    result.loss_N.sum().backward()
    assert leaf.grad is not None
    return result.loss_N.detach(), leaf.grad


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_all_positions(
    family: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    checkpointing: bool,
) -> None:
    base = load_unsharded(family(case), "int8", checkpointing)
    limited = losses_and_gradient(base)
    monkeypatch.setattr(OnlyRead, "forward", lambda self, x: super(OnlyRead, self).forward(x))
    for one, other in zip(limited, losses_and_gradient(base), strict=True):
        torch.testing.assert_close(one, other)


def test_only_positions_before_labels_are_computed(family: Callable[..., Path]) -> None:
    base, counts = load_unsharded(family("llama"), "int8"), list[int]()
    last_layer_mlp(base).down_proj.register_forward_pre_hook(
        lambda module, inputs: counts.append(inputs[0].shape[-2])
    )
    losses_and_gradient(base)
    assert counts == [2 + 2 + 1 + 1 + 1]  # both rows without text have their first label in common
    tokens, ids = 4, torch.ones(2, 4, dtype=torch.long)
    with base.unpacked():
        base(DecodeStep(ids, torch.ones_like(ids), base.new_cache()), [])
    assert counts[1:] == [tokens]


@pytest.mark.parametrize("case", CASES)
def test_the_plan_knows_which_families_are_limited(family: Callable[..., Path], case: str) -> None:
    base = load_unsharded(family(case), "int8")
    limited = base.packed and any(isinstance(module, OnlyRead) for module in base.modules())
    assert layer_sizes(base.model.config).limits_last_mlp is limited
