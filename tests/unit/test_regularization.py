"""Noise and dropout of a prompt: their size, and what they are a function of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.soft_prompts import soft_prompts
from trainer.prompts import regularization

PROMPT_PH = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 0.1


def perturbed(values: Tensor, seed: int, update: int, **settings: float) -> Tensor:
    return regularization.perturbed(soft_prompts([values])[0], seed, update, **settings).tensor


def test_without_regularization_nothing_changes() -> None:
    assert perturbed(PROMPT_PH, 1, 2) is PROMPT_PH


@pytest.mark.parametrize("what", [{"noise": 0.3}, {"dropout": 0.2}, {"noise": 0.3, "dropout": 0.2}])
def test_a_function_of_seed_and_update(what: dict[str, float]) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    once = perturbed(PROMPT_PH, 1, 2, **what)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(6)
    assert torch.equal(once, perturbed(PROMPT_PH, 1, 2, **what))
    assert not torch.equal(once, perturbed(PROMPT_PH, 1, 3, **what))
    assert not torch.equal(once, perturbed(PROMPT_PH, 2, 2, **what))
    # Neither do (1, 12) and (11, 2) meet: the two numbers are kept apart.
    assert not torch.equal(perturbed(PROMPT_PH, 1, 12, **what), perturbed(PROMPT_PH, 11, 2, **what))


def test_noise_is_a_share_of_the_prompt_s_size() -> None:
    for scale in (1e-3, 1.0):
        prompt = PROMPT_PH * scale
        drawn = perturbed(prompt, 0, 0, noise=0.3) - prompt
        share = drawn.square().mean().sqrt() / prompt.square().mean().sqrt()
        assert float(share) == pytest.approx(0.3, rel=0.05)


def test_noise_of_keys_and_values_is_that_of_their_layer() -> None:
    size = torch.tensor([[1.0, 0.01], [10.0, 0.1]])[None, :, :, None, None]  # [1, layers, 2, 1, 1]
    past = torch.randn(40, 2, 2, 2, 16, generator=torch.Generator().manual_seed(0)) * size
    drawn = perturbed(past, 0, 0, noise=0.5) - past
    shares = (drawn.square().mean((0, 3, 4)) / past.square().mean((0, 3, 4))).sqrt()
    torch.testing.assert_close(shares, torch.full_like(shares, 0.5), rtol=0.1, atol=0)


def test_dropout_keeps_the_mean() -> None:
    ones = torch.ones(200, 64)
    dropped = perturbed(ones, 0, 0, dropout=0.25)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_gradient_passes_through() -> None:
    prompt = PROMPT_PH.clone().requires_grad_()
    out = perturbed(prompt, 0, 0, noise=0.3, dropout=0.5)
    (gradient,) = torch.autograd.grad(out.sum(), prompt)
    assert torch.equal(gradient, torch.where(out == 0, 0.0, 2.0))
