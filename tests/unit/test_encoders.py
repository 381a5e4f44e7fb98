"""Encoders: PEFT's shapes and numbers, deterministic starts."""

from __future__ import annotations

import pytest
import torch
from peft import PrefixEncoder, PrefixTuningConfig, PromptEncoderConfig
from peft import PromptEncoder as PeftEncoder

from trainer.config import Prompt
from trainer.prompts.encoders import (
    EmbeddingEncoder,
    MLPEncoder,
    PrefixMLPEncoder,
    make_encoder,
)

P, H, E = 5, 8, 12


def make_init() -> torch.Tensor:
    return torch.randn(P, H, generator=torch.Generator().manual_seed(0))


def make_mlp(seed: int = 0) -> MLPEncoder:
    return MLPEncoder(make_init(), E, torch.Generator().manual_seed(seed))


def make_peft_mlp() -> PeftEncoder:
    return PeftEncoder(
        PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            token_dim=H,
            num_transformer_submodules=1,
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=E,
        )
    )


@pytest.mark.parametrize("batched", [False, True])
def test_mlp_equals_peft_forward_and_backward(batched: bool) -> None:
    ours, theirs = make_mlp(), make_peft_mlp()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    indices = torch.arange(P)[None] if batched else torch.arange(P)
    out, reference = ours(), theirs(indices).reshape(P, H)
    assert torch.equal(out, reference)
    gradient = torch.randn(P, H)
    out.backward(gradient)
    reference.backward(gradient)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


def test_peft_weights_load_into_ours() -> None:
    ours, theirs = make_mlp(), make_peft_mlp()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(), theirs(torch.arange(P)))


def test_mlp_start() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    encoder = make_mlp()
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert torch.equal(encoder.embedding.weight, make_init())
    torch.manual_seed(2)
    assert torch.equal(make_mlp()(), encoder())
    assert not torch.equal(make_mlp(seed=1)(), encoder())
    # torch's own start for nn.Linear: uniform within 1/sqrt(in_features).
    reference = torch.nn.Linear(400, 300)
    ours = MLPEncoder(torch.zeros(1, 400), 300, torch.Generator().manual_seed(0)).mlp_head[0]
    assert isinstance(ours, torch.nn.Linear)
    for a, b in ((ours.weight, reference.weight), (ours.bias, reference.bias)):
        assert a.abs().max() <= 1 / 20
        torch.testing.assert_close(a.std(), b.std(), rtol=0.15, atol=0)


def test_embedding_is_its_virtual_tokens() -> None:
    encoder = EmbeddingEncoder(make_init())
    out = encoder()
    assert torch.equal(out, make_init())
    out.backward(torch.ones(P, H))
    assert encoder.embedding.grad is not None
    assert torch.equal(encoder.embedding.grad, torch.ones(P, H))
    with torch.no_grad():
        encoder.embedding.zero_()
    assert torch.equal(out, make_init()), "virtual tokens that were given out have changed"


def test_run_file_chooses() -> None:
    generator = torch.Generator().manual_seed(0)
    tuning = make_encoder(Prompt(name="a", task="t"), make_init(), generator, H)
    assert isinstance(tuning, EmbeddingEncoder)
    assert tuning.shape == (P, H)
    default = make_encoder(Prompt(name="a", task="t", method="p_tuning"), make_init(), generator, H)
    assert isinstance(default, MLPEncoder)
    assert default.mlp_head[0].out_features == H
    wide = Prompt(name="a", task="t", method="p_tuning", encoder_hidden_size=E)
    encoder = make_encoder(wide, make_init(), generator, H)
    assert isinstance(encoder, MLPEncoder)
    assert encoder.mlp_head[0].out_features == E


def make_past() -> torch.Tensor:
    """Keys and values of 3 layers with 2 heads of 4."""
    return torch.randn(P, 3, 2, 2, 4, generator=torch.Generator().manual_seed(4))


def test_prefix_mlp_is_peft_s() -> None:
    settings = PrefixTuningConfig(
        num_virtual_tokens=P,
        token_dim=8,
        num_layers=3,
        num_attention_heads=2,
        encoder_hidden_size=E,
        prefix_projection=True,
        num_transformer_submodules=1,
    )
    theirs = PrefixEncoder(settings)
    ours = PrefixMLPEncoder(make_past(), E, torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict())
    made = theirs(torch.arange(P))
    torch.testing.assert_close(ours(), made.view(P, 3, 2, 2, 4))
    gradient = torch.randn(made.shape)
    made.backward(gradient)
    ours().backward(gradient.view(P, 3, 2, 2, 4))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_prefix_mlp_starts_where_it_is_told() -> None:
    def started(size: int, past: torch.Tensor) -> torch.Tensor:
        return PrefixMLPEncoder(past, size, torch.Generator().manual_seed(0))()

    torch.testing.assert_close(started(4 * P, make_past()), make_past(), rtol=1e-4, atol=1e-5)
    assert bool((started(P, torch.zeros_like(make_past())) == 0).all())
    # Too narrow to make all of it: as near as it can get.
    error = (started(2, make_past()) - make_past()).square().mean()
    assert error < (make_past() - make_past().mean(0)).square().mean()


def test_run_file_chooses_a_prefix_encoder() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = Prompt(name="a", task="t", method="prefix_tuning")
    encoder = make_encoder(plain, make_past(), generator, H)
    assert isinstance(encoder, EmbeddingEncoder)
    assert encoder.shape == make_past().shape
    mlp = Prompt(name="a", task="t", method="prefix_tuning", encoder="mlp")
    projected = make_encoder(mlp, make_past(), generator, H)
    assert isinstance(projected, PrefixMLPEncoder)
    assert projected.transform[0].out_features == H
