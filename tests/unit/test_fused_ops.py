"""Lean layers beside transformers' own: the same numbers, fewer saved bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, PhiConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from trainer.model.layers.fused_ops import FusedModule, compile_lean, lean_class, make_lean
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

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A module with random frozen weights, and the lean one."""
    torch.manual_seed(0)
    module = MODULES[kind]().to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    lean = copy.deepcopy(module)
    make_lean(lean)
    assert isinstance(lean, FusedModule)
    return module, lean


def run(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input, and saved bytes but those of weights."""
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
def test_the_same_numbers_in_fp32(kind: str) -> None:
    theirs, lean = (run(module, torch.float32) for module in pair(kind))
    torch.testing.assert_close(lean[0], theirs[0], rtol=0, atol=0)
    torch.testing.assert_close(lean[1], theirs[1], rtol=1e-5, atol=1e-6)
    assert lean[2] <= theirs[2]


@pytest.mark.parametrize("kind", MODULES)
def test_not_further_off_in_bf16(kind: str) -> None:
    exact = run(pair(kind)[0], torch.float32)
    theirs, lean = (run(module, torch.bfloat16) for module in pair(kind, torch.bfloat16))
    for i in (0, 1):
        off = [
            (results[i].float() - exact[i]).norm() / exact[i].norm() for results in (theirs, lean)
        ]
        assert off[1] <= 1.2 * off[0] + 1e-3, off


def test_a_gate_and_a_norm_save_less_in_bf16() -> None:
    for kind in ("silu", "norm"):
        theirs, lean = (run(module, torch.bfloat16)[2] for module in pair(kind, torch.bfloat16))
        assert lean < 0.7 * theirs, (kind, lean, theirs)


@pytest.mark.parametrize("kind", ["norm", "silu"])
def test_compiled_passes_give_the_same(kind: str) -> None:
    module, lean = pair(kind)
    compile_lean(lean)
    for actual, expected in zip(
        run(lean, torch.float32)[:2], run(module, torch.float32)[:2], strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_rotation(compiled: bool) -> None:
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = modeling_llama.LlamaAttention(config, 0).requires_grad_(False)
    lean = copy.deepcopy(attention)
    make_lean(lean)
    if compiled:
        compile_lean(lean)
    angle = torch.rand(1, TOKENS, HIDDEN // HEADS)
    results = []
    for module in (attention, lean):
        x = torch.randn(
            1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2), requires_grad=True
        )
        output, _ = module(x, position_embeddings=(angle.cos(), angle.sin()))
        output.square().sum().backward()
        results.append((output.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_transformers_itself_is_left_alone() -> None:
    before = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    make_lean(modeling_llama.LlamaAttention(LlamaConfig(**SIZES), 0))
    after = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    assert after == before


def test_what_is_not_known_stays_as_it_is() -> None:
    class Other(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 2

    odd_act = modeling_llama.LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu"))
    for module in (Other(HIDDEN), odd_act, PhiMLP(PhiConfig(**SIZES)), nn.LayerNorm(HIDDEN)):
        assert lean_class(module) is None
        kind = type(module)
        make_lean(module)
        assert type(module) is kind
