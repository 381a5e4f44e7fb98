"""Optimizer, schedule, clipping and early stop: against the libraries', and resumed to the bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from trainer.config import Prompt
from trainer.optimization import (
    EarlyStopping,
    PromptOptimizer,
    cosine_with_warmup,
    make_optimizer,
)


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": nn.Parameter(torch.randn(3, 4, generator=generator)),
        "b": nn.Parameter(torch.randn(5, generator=generator)),
    }


def make(parameters: dict[str, nn.Parameter], **changes: float | None) -> PromptOptimizer:
    settings = {
        "learning_rate": 0.05,
        "num_updates": 10,
        "num_warmup_updates": 3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    }
    return PromptOptimizer(parameters, **{**settings, **changes})  # type: ignore[arg-type]


def set_gradients(parameters: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (0, 1)])
def test_schedule_is_transformers(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 1):
        assert cosine_with_warmup(step, warmup, total) == reference.get_last_lr()[0]
        optimizer.step()
        reference.step()


def test_step_is_clipped_adamw() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make(ours)
    reference = torch.optim.AdamW(theirs.values(), lr=0.05, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(reference, 3, 10)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        assert optimizer.learning_rate == schedule.get_last_lr()[0]
        expected = float(nn.utils.clip_grad_norm_(theirs.values(), 1.0))
        assert optimizer.step() == pytest.approx(expected, rel=1e-6)
        reference.step()
        schedule.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)
        assert ours[name].grad is None


def test_no_clipping_where_none_is_asked() -> None:
    """SGD would show it directly; Adam's first moment shows it too."""
    parameters = make_parameters()
    optimizer = make(parameters, max_grad_norm=None)
    set_gradients(parameters, 0, scale=1000)
    gradient = parameters["b"].grad
    assert gradient is not None
    optimizer.step()
    torch.testing.assert_close(optimizer.state()[0]["b/exp_avg"], gradient * 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_non_finite_norm_changes_nothing(bad: float) -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    optimizer.step()
    weights = {k: v.detach().clone() for k, v in parameters.items()}
    before, counters = optimizer.state()
    set_gradients(parameters, 1)
    assert parameters["b"].grad is not None
    parameters["b"].grad[0] = bad  # 1e30 is finite, its square is not
    assert not math.isfinite(optimizer.step())
    after, counters_after = optimizer.state()
    assert counters == counters_after == {"updates": 1}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(weights[k], parameters[k]) for k in weights)
    assert parameters["b"].grad is None


@pytest.mark.parametrize("done", [0, 4])
def test_resumed_equals_never_stopped(done: int) -> None:
    straight = make_parameters()
    optimizer = make(straight)
    for step in range(done):
        set_gradients(straight, step)
        optimizer.step()
    tensors, meta = optimizer.state()
    resumed = {k: nn.Parameter(v.detach().clone()) for k, v in straight.items()}
    again = make(resumed)
    again.load_state(tensors, json.loads(json.dumps(meta)))
    for step in range(done, 10):
        set_gradients(straight, step)
        set_gradients(resumed, step)
        assert optimizer.step() == again.step()
        assert all(torch.equal(straight[k], resumed[k]) for k in straight), step


def test_state_is_a_copy() -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    optimizer.step()
    tensors, _ = optimizer.state()
    kept = {k: v.clone() for k, v in tensors.items()}
    set_gradients(parameters, 1)
    optimizer.step()
    assert all(torch.equal(tensors[k], kept[k]) for k in kept)
    resumed = make_parameters()
    again = make(resumed)
    again.load_state(tensors, {"updates": 1})
    set_gradients(resumed, 1)
    again.step()
    assert all(torch.equal(tensors[k], kept[k]) for k in kept)


def test_run_file_chooses() -> None:
    prompt = Prompt(name="a", task="t", learning_rate=0.5, warmup_ratio=0.03)
    optimizer = make_optimizer(prompt, make_parameters(), 50)
    rates = []
    parameters = optimizer._parameters
    for step in range(3):
        rates.append(optimizer.learning_rate)
        set_gradients(parameters, step)
        optimizer.step()
    # 3% of 50 steps, rounded up, are two updates of warm-up.
    assert rates == [0.0, 0.25, 0.5]


def test_early_stopping() -> None:
    early = EarlyStopping(patience=2)
    losses = {10: 1.0, 20: 1.0, 30: 0.5, 40: math.nan, 50: 0.6}
    seen = [(early.update(step, loss), early.should_stop) for step, loss in losses.items()]
    improved, stop = zip(*seen, strict=True)
    assert improved == (True, False, True, False, False), "equal is no improvement"
    assert stop == (False, False, False, False, True)
    assert (early.best, early.best_step) == (0.5, 30)


def test_early_stopping_without_patience_only_tracks() -> None:
    early = EarlyStopping()
    early.update(1, 0.5)
    for step in range(2, 100):
        early.update(step, 1.0)
    assert not early.should_stop
    assert early.best_step == 1


def test_early_stopping_resumes() -> None:
    losses = [math.nan, 1.0, 2.0, 0.9, 0.95, math.inf, 1.0]
    for cut in range(len(losses) + 1):
        straight, before = EarlyStopping(3), EarlyStopping(3)
        for step, loss in enumerate(losses[:cut]):
            before.update(step, loss)
        resumed = EarlyStopping(3)
        resumed.load_state(json.loads(json.dumps(before.state())))
        for step, loss in enumerate(losses):
            expected = straight.update(step, loss)
            if step >= cut:
                assert resumed.update(step, loss) == expected
        assert straight.should_stop
        assert resumed.should_stop
        assert resumed.state() == straight.state()
