"""The last layer computes the positions that predict labels, the first has no backward for text.

Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import CASES
from trainer.config import Base
from trainer.cost_model.base_headers import UNPLANNED, open_base_shape
from trainer.data.token_table import Example
from trainer.model.decode_step import DecodeStep
from trainer.model.families import layer_sizes
from trainer.model.layers.end_layers import EndLayers, OnlyLearned, OnlyRead
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.matmul_selection import use_matmul
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


def losses_and_gradient(base: PromptedBase) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    leaf = torch.randn(VIRTUAL, base.hidden_size, requires_grad=True)
    result = base(batch_of(ROWS), [VirtualTokens(leaf)]).losses
    assert result is not None
    result.loss_N.sum().backward()
    assert leaf.grad is not None
    return result.loss_N.detach(), leaf.grad


@pytest.mark.parametrize(
    "case", ["llama", "phi3", "gemma2", "qwen3_moe", "gpt_oss", "deepseek_v3", "biogpt", "falcon"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_all_positions(
    family: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    checkpointing: bool,
) -> None:
    base = load_unsharded(family(case), "int8", checkpointing)
    limited = losses_and_gradient(base)
    monkeypatch.setattr(EndLayers, "limit", lambda *_: None)
    base._ends.read_U = base._ends.num_learned = base._ends.last = None
    for one, other in zip(limited, losses_and_gradient(base), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["dequantize", "int8"])
def test_only_positions_that_are_needed_are_computed(
    family: Callable[..., Path], kind: str
) -> None:
    base = load_unsharded(family("llama"), "int8")
    use_matmul(base, kind, 6.0)
    calls: dict[str, list[tuple[int, bool]]] = {}
    first, last = base.model.base_model.layers
    for name, product in {
        "first": first.self_attn.k_proj,
        "queries": last.self_attn.q_proj,
        "keys": last.self_attn.k_proj,
        "output": last.self_attn.o_proj,
        "mlp": last.mlp.gate_proj,
    }.items():
        _note(product, calls.setdefault(name, []))
    losses_and_gradient(base)
    total = VIRTUAL + sum(n for n, _ in ROWS)
    read = [(2 + 2 + 1 + 1 + 1, True)]  # rows without text have their first label in common
    assert calls["first"] == [(VIRTUAL, True), (total - VIRTUAL, False)]
    assert calls["queries"] == calls["output"] == read
    assert calls["keys"] == [(total, True)]
    assert calls["mlp"] == ([] if kind == "int8" else read), "a fused one reads the weight itself"

    tokens, ids = 4, torch.ones(2, 4, dtype=torch.long)
    for noted in calls.values():
        noted.clear()
    with base.unpacked():
        base(DecodeStep(ids, torch.ones_like(ids), base.new_cache()), [])
    assert calls["first"] == calls["queries"] == calls["output"] == [(tokens, False)]


def _note(layer: Any, calls: list[tuple[int, bool]]) -> None:
    product = layer.product

    def noted(x: Tensor, matrix: Any) -> Tensor:
        calls.append((x.shape[-2], x.requires_grad))
        y: Tensor = product(x, matrix)
        return y

    layer.product = noted


@pytest.mark.parametrize("case", CASES)
def test_the_plan_knows_what_is_limited(family: Callable[..., Path], case: str) -> None:
    base = load_unsharded(family(case), "int8")
    sizes, layers = layer_sizes(base.model.config), base.model.base_model
    mlp = any(isinstance(m, OnlyRead) and not isinstance(m, FrozenLinear) for m in layers.modules())
    assert sizes.limits_last_mlp is (base.packed and mlp)
    assert sizes.limits_ends is (base.packed and base._ends.last is not None)
    if not sizes.limits_ends or base.model.config.model_type in UNPLANNED:
        return
    shape, _, _ = open_base_shape(Base(model=str(family(case))), itemsize=2)
    for kind, planned in ((OnlyRead, shape.only_read), (OnlyLearned, shape.only_learned)):
        products = [m for m in layers.modules() if isinstance(m, kind)]
        assert planned == sum(m.weight.numel() for m in products if isinstance(m, FrozenLinear))
