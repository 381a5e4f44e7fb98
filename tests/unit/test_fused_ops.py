"""Fused modules against those of transformers: equal numbers, fewer saved bytes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PhiConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from tests.family_bases import CASES, family_config
from trainer.model.layers import compilation, fused_ops
from trainer.model.layers.fused_ops import (
    FusedModule,
    compile_fused_operations,
    fuse_operations,
    fused_class,
    fused_counts,
    fused_gate,
)
from trainer.model.layers.moe import is_experts
from trainer.training.saved_tensors import SavedBytes

TOKENS, HIDDEN, HEADS = 9, 16, 2
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: modeling_llama.LlamaRMSNorm(HIDDEN),
    "offset norm": lambda: Gemma3RMSNorm(HIDDEN),
    "silu": lambda: modeling_llama.LlamaMLP(LlamaConfig(**SIZES)),
    "gelu": lambda: modeling_llama.LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu")),
    "tanh gelu": lambda: Gemma3MLP(Gemma3TextConfig(**SIZES)),
    "joint": lambda: Phi3MLP(Phi3Config(**SIZES)),
}


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A module with random frozen weights, and its fused copy."""
    torch.manual_seed(0)
    module = MODULES[kind]().to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    fused = copy.deepcopy(module)
    fuse_operations(fused)
    assert isinstance(fused, FusedModule)
    return module, fused


def run(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input, and saved bytes without those of weights."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, TOKENS, HIDDEN, generator=draw).to(dtype).requires_grad_()
    saved = SavedBytes()
    with saved:
        y = module(x)
    y.backward(torch.randn(y.shape, generator=draw).to(dtype))
    assert x.grad is not None
    weights = sum(parameter.nbytes for parameter in module.parameters())
    return y.detach(), x.grad, saved.total - weights


@pytest.mark.parametrize("kind", MODULES)
def test_numbers_are_equal_in_fp32(kind: str) -> None:
    original, fused = (run(module, torch.float32) for module in pair(kind))
    torch.testing.assert_close(fused[0], original[0], rtol=0, atol=0)
    torch.testing.assert_close(fused[1], original[1], rtol=1e-5, atol=1e-6)
    assert fused[2] <= original[2]


@pytest.mark.parametrize("kind", MODULES)
def test_error_is_not_larger_in_bf16(kind: str) -> None:
    exact = run(pair(kind)[0], torch.float32)
    original, fused = (run(module, torch.bfloat16) for module in pair(kind, torch.bfloat16))
    for i in (0, 1):
        errors = [
            (results[i].float() - exact[i]).norm() / exact[i].norm()
            for results in (original, fused)
        ]
        assert errors[1] <= 1.2 * errors[0] + 1e-3, errors


def test_gate_and_norm_save_less_in_bf16() -> None:
    for kind in ("silu", "norm"):
        original, fused = (run(module, torch.bfloat16)[2] for module in pair(kind, torch.bfloat16))
        assert fused < 0.7 * original, (kind, fused, original)


@pytest.mark.parametrize("kind", ["norm", "silu"])
def test_compiled_loops_give_equal_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "MAX_SEPARATE", 0)
    module, fused = pair(kind)
    compile_fused_operations(fused)
    for actual, expected in zip(
        run(fused, torch.float32)[:2], run(module, torch.float32)[:2], strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_rotation(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "MAX_SEPARATE", 0)
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = modeling_llama.LlamaAttention(config, 0).requires_grad_(False)
    fused = copy.deepcopy(attention)
    fuse_operations(fused)
    if compiled:
        compile_fused_operations(fused)
    angle = torch.rand(1, TOKENS, HIDDEN // HEADS)
    results = []
    for module in (attention, fused):
        x = torch.randn(
            1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2), requires_grad=True
        )
        output, _ = module(x, position_embeddings=(angle.cos(), angle.sin()))
        output.square().sum().backward()
        results.append((output.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_classes_of_transformers_are_not_changed() -> None:
    before = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    fuse_operations(modeling_llama.LlamaAttention(LlamaConfig(**SIZES), 0))
    after = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    assert after == before


def test_functions_that_became_modules_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers makes them where the package ``kernels`` is installed."""

    class Func(nn.Module):
        forward = staticmethod(modeling_llama.apply_rotary_pos_emb)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", Func())
    monkeypatch.setattr(fused_ops, "apply_rotary_pos_emb", Func())
    attention = modeling_llama.LlamaAttention(LlamaConfig(**SIZES), 0)
    fuse_operations(attention)
    assert fused_counts(attention) == {"rotary attention": 1}


def test_unknown_modules_are_not_changed() -> None:
    class Other(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 2

    other_act = modeling_llama.LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu"))
    for module in (Other(HIDDEN), other_act, PhiMLP(PhiConfig(**SIZES)), nn.LayerNorm(HIDDEN)):
        assert fused_class(module) is None
        kind = type(module)
        fuse_operations(module)
        assert type(module) is kind


#: Fused operations in two layers of every family of tests/family_bases.py, with transformers 5.24.
#: If a release matches fewer, its modules were rewritten: adapt ``fused_ops.KNOWN``.
FUSED_OPERATIONS = {
    "5 RMSNorm, 2 gated MLP, 2 rotary attention": (
        "llama mistral qwen2 gemma cwm diffllama granite ministral ministral3 smollm3 vaultgemma"
    ),
    "9 RMSNorm, 2 gated MLP, 2 rotary attention": "qwen3 gemma2 doge exaone4 hunyuan_v1_dense",
    "13 RMSNorm, 2 gated MLP, 2 rotary attention": "gemma3",
    "5 RMSNorm, 2 gated MLP": "phi3 phi3-longrope ernie4_5 glm",
    "9 RMSNorm, 2 gated MLP": "glm4",
    "2 gated MLP, 2 rotary attention": "stablelm",
    "2 gated MLP": "cohere cohere2 olmo olmo2 helium olmo3",
    "5 RMSNorm, 2 rotary attention": "arcee seed_oss",
    "2 rotary attention": ("phi falcon falcon-alibi falcon-grouped starcoder2 jais2 persimmon"),
    "5 RMSNorm, 2 rotary attention, 2 expert gate": "mixtral granitemoe granitemoeshared",
    "9 RMSNorm, 2 rotary attention, 2 expert gate": "qwen3_moe olmoe mellum",
    "5 RMSNorm, 2 gated MLP, 2 rotary attention, 2 expert gate": "qwen2_moe",
    "9 RMSNorm, 2 gated MLP, 2 rotary attention, 2 expert gate": "hunyuan_v1_moe",
    "9 RMSNorm, 2 gated MLP, 2 expert gate": "deepseek_v2",
    "2 gated MLP, 2 rotary attention, 1 expert gate": "afmoe",
    "2 expert gate": "flex_olmo",
}


@pytest.mark.parametrize("operations", FUSED_OPERATIONS)
def test_families_match_at_least_as_often_as_recorded(operations: str) -> None:
    recorded = Counter(
        {name: int(n) for n, name in (part.split(" ", 1) for part in operations.split(", "))}
    )
    for case in FUSED_OPERATIONS[operations].split():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(family_config(case))
        fuse_operations(model)
        counts = fused_counts(model)
        experts = [module for module in model.modules() if is_experts(module)]
        counts["expert gate"] = sum(fused_gate(module) is not None for module in experts)
        assert counts >= recorded, case


def test_every_recorded_family_is_a_case() -> None:
    assert {case for cases in FUSED_OPERATIONS.values() for case in cases.split()} <= set(CASES)
