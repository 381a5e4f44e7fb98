"""Fused int8 blocks against the same layers with separate products."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from trainer.model.layers.compilation import MAX_SEPARATE
from trainer.model.layers.fused_ops import RecomputedGatedMLP, fuse_operations
from trainer.model.layers.int8_blocks import SharedInput
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.matmul_selection import use_matmul
from trainer.model.layers.quantization import quantize_rows

TOKENS, HIDDEN = 13, 64
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
}


def with_int8_layers(module: nn.Module, bias: bool = False) -> nn.Module:
    """Replace the linear layers by quantized ones with random weights; fuse recognized modules."""
    torch.manual_seed(0)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            layer = FrozenLinear(child.in_features, child.out_features, bias, quantized=True)
            stored, layer.absmax = quantize_rows(torch.randn(layer.weight.shape) * 0.2)
            layer.weight = nn.Parameter(stored, requires_grad=False)
            if bias:
                values = torch.randn(child.out_features)
                layer.bias = nn.Parameter(values, requires_grad=False)
            setattr(module, name, layer)
    holder = nn.ModuleList([module])
    fuse_operations(holder)
    return module


def run(module: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Output, and input-gradient for a random gradient of the output."""
    x = x.clone().requires_grad_()
    y = module(x, *arguments)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("product", ["int8", "int8x2"])
def test_a_gated_mlp_equals_separate_products(act: str, product: str, dtype: torch.dtype) -> None:
    if act == "silu":
        separate = with_int8_layers(LlamaMLP(LlamaConfig(**SIZES)))
    else:
        separate = with_int8_layers(Gemma3MLP(Gemma3TextConfig(**SIZES)))
    fused = copy.deepcopy(separate)
    use_matmul(separate, product, 0.0)
    use_matmul(fused, product, 0.0)
    assert isinstance(fused, RecomputedGatedMLP)
    assert fused.int8_terms
    separate.int8_terms = None  # type: ignore[assignment]
    # As many that loops are compiled in one of the cases.
    tokens = MAX_SEPARATE // HIDDEN + 1 if (act, dtype) == ("silu", torch.float32) else TOKENS
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    for actual, expected in zip(run(fused, x), run(separate, x), strict=True):
        error = (actual - expected).float().norm() / expected.float().norm()
        assert error < (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("layer", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_of_an_adapter_change_a_fused_mlp(layer: str, before: bool) -> None:
    fused = with_int8_layers(LlamaMLP(LlamaConfig(**SIZES)))
    use_matmul(fused, "int8", 0.0)
    separate = copy.deepcopy(fused)
    separate.int8_terms = None  # type: ignore[assignment]
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    without, _ = run(fused, x)
    for module in (fused, separate):
        if before:
            module.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: inputs[0] * 3)
        else:
            module.get_submodule(layer).register_forward_hook(lambda _, __, y: y * 3)
    actual, expected = run(fused, x), run(separate, x)
    assert not torch.allclose(actual[0], without, rtol=0.1)
    torch.testing.assert_close(actual, expected)


def test_an_mlp_with_a_bias_or_another_product_is_not_fused() -> None:
    with_bias = with_int8_layers(LlamaMLP(LlamaConfig(**SIZES)), bias=True)
    use_matmul(with_bias, "int8", 0.0)
    outliers = with_int8_layers(LlamaMLP(LlamaConfig(**SIZES)))
    use_matmul(outliers, "int8_outliers", 6.0)
    assert not with_bias.int8_terms
    assert not outliers.int8_terms


class Sum(nn.Module):
    """Queries, keys and values of an attention, added up."""

    def __init__(self, attention: Any, order: str = "qkv") -> None:
        super().__init__()
        self.layers = [getattr(attention, f"{name}_proj") for name in order]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("product", ["int8", "int8x2"])
def test_queries_keys_and_values_share_their_input(product: str, bias: bool) -> None:
    separate = with_int8_layers(LlamaAttention(LlamaConfig(**SIZES), 0), bias)
    fused = copy.deepcopy(separate)
    use_matmul(fused, product, 0.0)
    for layer in separate.children():  # one by one, where nothing is shared
        use_matmul(layer, product, 0.0)
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = run(Sum(separate), x)
    copied = copy.deepcopy(fused)
    for module in (fused, copied):
        for actual, wanted in zip(run(Sum(module), x), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    copied.q_proj.weight.data.zero_()  # type: ignore[union-attr]
    assert torch.equal(run(Sum(fused), x)[0], expected[0])  # a copy has weights of its own


def test_another_input_is_not_taken_for_the_same() -> None:
    attention: Any = with_int8_layers(LlamaAttention(LlamaConfig(**SIZES), 0))
    use_matmul(attention, "int8", 0.0)
    draw = torch.Generator().manual_seed(1)
    one, two = (torch.randn(1, TOKENS, HIDDEN, generator=draw) for _ in range(2))
    assert isinstance(attention.q_proj.product.func.__self__, SharedInput)
    q, k = attention.q_proj(one), attention.k_proj(two)
    assert torch.equal(q, attention.q_proj(one))
    assert torch.equal(k, attention.k_proj(two))
    assert not torch.equal(k, attention.k_proj(one))


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_products_left_when_memory_ran_out_are_dropped(num_inputs: int) -> None:
    attention: Any = with_int8_layers(LlamaAttention(LlamaConfig(**SIZES), 0))
    use_matmul(attention, "int8", 0.0)
    shared = attention.q_proj.product.func.__self__
    inputs = [torch.randn(1, TOKENS, HIDDEN) for _ in range(3)]
    attention.q_proj(inputs[0])
    assert len(shared._pending) == 1
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        for x in inputs[1 : 1 + num_inputs]:
            layer(x)
    assert not shared._pending


def test_the_product_of_fused_layers_can_be_changed() -> None:
    """As ``promptshard inspect`` does after loading."""

    def whole(module: nn.Module) -> nn.Module:
        return Sum(module) if isinstance(module, LlamaAttention) else module

    modules = (LlamaMLP(LlamaConfig(**SIZES)), LlamaAttention(LlamaConfig(**SIZES), 0))
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    for module in map(with_int8_layers, modules):
        changed, expected = module, copy.deepcopy(module)
        use_matmul(changed, "int8", 0.0)
        use_matmul(expected, "int8x2", 0.0)
        wanted = run(whole(expected), x)
        assert not torch.equal(run(whole(changed), x)[0], wanted[0])
        use_matmul(changed, "int8x2", 0.0)
        for actual, one in zip(run(whole(changed), x), wanted, strict=True):
            assert torch.equal(actual, one)
