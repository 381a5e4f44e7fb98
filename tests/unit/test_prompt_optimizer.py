"""Optimizer, schedule, clipping and early stop: against the libraries', and resumed to the bit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.optimization import Adafactor as TheirAdafactor

from trainer.checkpointing.state_tensors import join_tensors, split_tensors
from trainer.config import Prompt
from trainer.config.ranking import score_key
from trainer.prompts.soft_prompt import PrefixKeyValues
from trainer.training.early_stopping import EarlyStopping
from trainer.training.lr_schedules import learning_rate_factor
from trainer.training.optimizers import Adafactor, Muon
from trainer.training.prompt_optimizer import PromptOptimizer, make_optimizer


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": nn.Parameter(torch.randn(3, 4, generator=generator)),
        "b": nn.Parameter(torch.randn(5, generator=generator)),
    }


def make(
    parameters: dict[str, nn.Parameter], **changes: float | str | bool | None
) -> PromptOptimizer:
    settings = {
        "learning_rate": 0.05,
        "num_updates": 10,
        "num_warmup_updates": 3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "betas": (0.9, 0.98),
        "schedule": "cosine",
    }
    return PromptOptimizer(parameters, **{**settings, **changes})  # type: ignore[arg-type]


def set_gradients(parameters: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (0, 1)])
def test_schedule_is_transformers_after_warm_up(schedule: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]()
    for step in range(total):
        # In warm-up ours is the line from 0, one update before the first, to 1 at its end.
        rising = (step + 1) / (warmup + 1)
        expected = rising if step < warmup else reference.get_last_lr()[0]
        assert learning_rate_factor(schedule, step, warmup, total) == pytest.approx(
            expected, abs=1e-12
        )
        optimizer.step()
        reference.step()


@pytest.mark.fault("gradient is infinite or spikes")
def test_step_is_clipped_adamw() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make(ours)
    reference = torch.optim.AdamW(theirs.values(), lr=0.05, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        reference.param_groups[0]["lr"] = 0.05 * learning_rate_factor("cosine", step, 3, 10)
        assert optimizer.learning_rate == reference.param_groups[0]["lr"]
        expected = float(nn.utils.clip_grad_norm_(theirs.values(), 1.0))
        assert optimizer.step() == pytest.approx(expected, rel=1e-6)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)
        assert ours[name].grad is None


def test_gradients_are_not_clipped_by_default() -> None:
    """SGD would show it directly; Adam's first moment shows it too."""
    parameters = make_parameters()
    optimizer = make(parameters, max_grad_norm=None)
    set_gradients(parameters, 0, scale=1000)
    gradient = parameters["b"].grad
    assert gradient is not None
    optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["b/exp_avg"], gradient * 0.1)


@pytest.mark.fault("gradient is infinite or spikes")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_non_finite_norm_changes_nothing(bad: float) -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    optimizer.step()
    weights = {k: v.detach().clone() for k, v in parameters.items()}
    before = optimizer.state_dict()
    set_gradients(parameters, 1)
    assert parameters["b"].grad is not None
    parameters["b"].grad[0] = bad  # 1e30 is finite, its square is not
    assert not math.isfinite(optimizer.step())
    after = optimizer.state_dict()
    assert (before.pop("updates"), before.pop("scale")) == (1, 1.0)
    assert (after.pop("updates"), after.pop("scale")) == (1, 1.0)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(weights[k], parameters[k]) for k in weights)
    assert parameters["b"].grad is None


def test_adafactor_is_transformers_without_parameter_scaling() -> None:
    """Matrices are factored, vectors not; gradients grow so that updates are clipped."""
    ours, theirs = make_parameters(), make_parameters()
    optimizer = Adafactor(ours.values(), lr=0.3)
    reference = TheirAdafactor(
        theirs.values(), lr=0.3, scale_parameter=False, relative_step=False, weight_decay=0.0
    )
    for step in range(8):
        set_gradients(ours, step, scale=float(step + 1))
        set_gradients(theirs, step, scale=float(step + 1))
        optimizer.step()
        reference.step()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_sgd_is_torch_s_with_decoupled_decay() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make(ours, optimizer="sgd", momentum=0.9, schedule="constant", num_warmup_updates=0)
    reference = torch.optim.SGD(theirs.values(), lr=0.05, momentum=0.9)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        with torch.no_grad():
            for parameter in theirs.values():
                parameter.mul_(1 - 0.05 * 0.1)
        optimizer.step()
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)


def test_decay_to_start_pulls_to_the_initialization() -> None:
    """With no gradient, each update goes a share of ``rate * decay`` of the way back."""
    parameters = make_parameters()
    start = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = make(parameters, schedule="constant", num_warmup_updates=0, decay_to_start=True)
    with torch.no_grad():
        for value in parameters.values():
            value += 1
    for value in parameters.values():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in parameters.items():
        torch.testing.assert_close(value - start[name], torch.full_like(value, 1 - 0.05 * 0.1))


def test_a_relative_rate_is_scale_invariant() -> None:
    """The same problem in other units, as the same base with larger embeddings gives: Adam with a
    rate relative to the start goes the same way, with an absolute one it does not."""

    def trained(scale: float, relative: bool) -> torch.Tensor:
        weight = make_parameters()["a.weight"].detach() * scale
        parameters = {"a": nn.Parameter(weight)}
        optimizer = make(parameters, scale=scale if relative else 1.0, max_grad_norm=None)
        for _ in range(8):
            (parameters["a"] / scale - 0.5).square().sum().backward()
            optimizer.step()
        return parameters["a"].detach() / scale

    torch.testing.assert_close(trained(0.01, True), trained(100.0, True), rtol=0, atol=1e-4)
    assert (trained(0.01, False) - trained(100.0, False)).abs().max() > 0.1


def test_average_is_that_of_the_weights_so_far() -> None:
    parameters = make_parameters()
    optimizer = make(parameters, ema_decay=0.3)
    expected = parameters["b"].detach().clone()
    for step in range(8):
        set_gradients(parameters, step)
        optimizer.step()
        decay = min(0.3, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * parameters["b"].detach()
        assert optimizer.averaged is not None
        torch.testing.assert_close(optimizer.averaged["b"], expected)
    assert not torch.equal(optimizer.averaged["b"], parameters["b"])
    before = optimizer.averaged["b"].clone()
    set_gradients(parameters, 8)
    assert parameters["b"].grad is not None
    parameters["b"].grad[0] = math.nan
    optimizer.step()
    assert torch.equal(optimizer.averaged["b"], before)


#: Every kind of state that a checkpoint must hold.
KINDS: list[dict[str, float | str | bool | None]] = [
    {},
    {"optimizer": "adafactor", "schedule": "constant", "ema_decay": 0.9},
    {"optimizer": "sgd", "schedule": "linear", "momentum": 0.9, "decay_to_start": True},
    {"optimizer": "sgd"},
    {"optimizer": "muon", "momentum": 0.5, "ema_decay": 0.9},
    {"scale": 0.3},
]


@pytest.mark.parametrize("done", [0, 4])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_resumed_equals_never_stopped(
    kind: dict[str, float | str | bool | None], done: int
) -> None:
    straight = make_parameters()
    if kind.get("optimizer") == "muon":  # trains matrices
        straight["b"] = nn.Parameter(torch.randn(3, 16))
    optimizer = make(straight, **kind)
    for step in range(done):
        set_gradients(straight, step)
        optimizer.step()
    tensors, meta = split_tensors(optimizer.state_dict())
    assert all(value.dtype == torch.float32 for value in tensors.values())
    resumed = {k: nn.Parameter(v.detach().clone()) for k, v in straight.items()}
    again = make(resumed, **kind)
    again.load_state_dict(join_tensors(tensors, json.loads(json.dumps(meta))))
    for step in range(done, 10):
        set_gradients(straight, step)
        set_gradients(resumed, step)
        assert optimizer.step() == again.step()
        assert all(torch.equal(straight[k], resumed[k]) for k in straight), step
    ours, theirs = (split_tensors(o.state_dict())[0] for o in (optimizer, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_state_is_a_copy() -> None:
    parameters = make_parameters()
    optimizer = make(parameters)
    set_gradients(parameters, 0)
    optimizer.step()
    tensors, _ = split_tensors(optimizer.state_dict())
    kept = {k: v.clone() for k, v in tensors.items()}
    set_gradients(parameters, 1)
    optimizer.step()
    assert all(torch.equal(tensors[k], kept[k]) for k in kept)
    resumed = make_parameters()
    again = make(resumed)
    again.load_state_dict({**tensors, "updates": 1, "scale": 1.0})
    set_gradients(resumed, 1)
    again.step()
    assert all(torch.equal(tensors[k], kept[k]) for k in kept)


def test_run_file_chooses() -> None:
    prompt = Prompt(name="a", task="t", optimizer="adamw", learning_rate=0.5, warmup_ratio=0.03)
    optimizer = make_optimizer(prompt, make_parameters(), 50)
    rates = []
    parameters = optimizer._parameters
    for step in range(3):
        rates.append(optimizer.learning_rate)
        set_gradients(parameters, step)
        optimizer.step()
    # 3% of 50 steps, rounded up, are two updates of warm-up, at one and two thirds.
    assert rates == pytest.approx([0.5 / 3, 1 / 3, 0.5])


def test_default_rate_is_relative_where_a_prompt_has_a_scale() -> None:
    def rates(**settings: object) -> tuple[float | None, float | None]:
        prompt = Prompt.model_validate({"name": "a", "task": "t", **settings})
        assert Prompt.model_validate(prompt.model_dump(mode="json")) == prompt
        return prompt.learning_rate, prompt.relative_learning_rate

    assert rates() == (None, 0.1)
    assert rates(method="prefix_tuning") == (None, 0.1)
    for encoder in (None, "mlp"):
        assert rates(method="p_tuning", encoder=encoder) == (None, 0.2)
    assert rates(method="p_tuning", encoder="lstm") == (0.003, None)
    assert rates(method="p_tuning", encoder="residual") == (None, 0.1)
    assert rates(method="prefix_tuning", encoder="mlp") == (None, 0.1)
    reader = {"method": "p_tuning", "encoder": "text", "init": {"text": "a"}}
    assert rates(**reader) == (0.003, None)
    assert rates(method="prefix_tuning", init="zero") == (0.003, None)
    assert rates(learning_rate=0.1) == (0.1, None)
    assert rates(preset="lester") == (0.3, None)
    assert rates(preset="lester", relative_learning_rate=0.5) == (None, 0.5)
    prompt = Prompt(name="a", task="t", warmup_ratio=0)
    assert make_optimizer(prompt, make_parameters(), 9, 0.3).learning_rate == pytest.approx(0.03)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than its Muon")
def test_muon_is_torch_s_where_a_matrix_is_trained() -> None:
    """Theirs multiplies in bfloat16, and makes its rate that of Adam by 0.2 / sqrt(longer side)."""
    ours = nn.Parameter(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    one = Muon([ours], lr=0.02, momentum=0.7)
    other = torch.optim.Muon(
        [theirs],
        lr=0.1,
        momentum=0.7,
        nesterov=False,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(5):
        for parameter in (ours, theirs):
            set_gradients({"p": parameter}, step, scale=1e-4)
        one.step()
        other.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    cosine = nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0)
    assert float(cosine) > 0.99
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (1, 9)])
def test_muon_moves_all_directions_by_its_rate(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    prompt = nn.Parameter(torch.zeros(shape))
    # One direction a hundred times as loud as the others.
    loud = torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1])
    prompt.grad = 100 * loud + torch.randn(shape, generator=generator)
    Muon([prompt], lr=0.05).step()
    assert float(prompt.detach().square().mean().sqrt()) == pytest.approx(0.05, rel=1e-5)
    singular_values = torch.linalg.svdvals(prompt.detach())
    assert float(singular_values[0] / singular_values[-1]) < 2.5


def test_muon_takes_keys_and_values_layer_by_layer() -> None:
    generator = torch.Generator().manual_seed(2)
    prompt = nn.Parameter(torch.zeros(5, 3, 2, 4, 8))
    gradient = torch.randn(5, 3, 2, 4, 8, generator=generator)
    gradient[:, 1, 0] = 0  # nothing to learn from
    gradient[:, 2] *= 1e-6
    prompt.grad = gradient
    Muon([prompt], lr=0.1, kind=PrefixKeyValues).step()
    for layer in range(3):
        for kind in range(2):
            alone = nn.Parameter(torch.zeros(5, 32))
            alone.grad = gradient[:, layer, kind].reshape(5, 32).clone()
            Muon([alone], lr=0.1).step()
            assert torch.equal(prompt[:, layer, kind].reshape(5, 32), alone)
            rms = 0.0 if (layer, kind) == (1, 0) else 0.1
            assert float(alone.detach().square().mean().sqrt()) == pytest.approx(rms)


def test_the_default_is_muon_where_the_prompt_itself_is_trained() -> None:
    def chosen(**settings: object) -> tuple[object, ...]:
        prompt = Prompt.model_validate({"name": "a", "task": "t", **settings})
        assert Prompt.model_validate(prompt.model_dump(mode="json")) == prompt
        return prompt.optimizer, prompt.momentum, prompt.betas

    muon, adamw = ("muon", 0.5, None), ("adamw", None, (0.8, 0.99))
    assert chosen() == chosen(method="prefix_tuning") == chosen(optimizer=None) == muon
    assert chosen(method="p_tuning") == chosen(method="prefix_tuning", encoder="mlp") == adamw
    assert chosen(optimizer="adamw") == chosen(betas=[0.8, 0.99]) == adamw
    assert chosen(momentum=0.9) == ("muon", 0.9, None)
    assert chosen(optimizer="sgd", learning_rate=1) == ("sgd", None, None)
    assert chosen(preset="lester") == ("adafactor", None, None)
    optimizer = make_optimizer(Prompt(name="a", task="t"), make_parameters(), 9)
    assert isinstance(optimizer._optimizer, Muon)
    assert optimizer._optimizer.param_groups[0]["momentum"] == 0.5


def test_the_preset_is_lesters_recipe_unless_overridden() -> None:
    lester = Prompt(name="a", task="t", preset="lester")
    optimizer = make_optimizer(lester, make_parameters(), 50)
    assert isinstance(optimizer._optimizer, Adafactor)
    assert [optimizer.learning_rate, lester.weight_decay, lester.max_grad_norm] == [0.3, 1e-5, None]
    set_gradients(optimizer._parameters, 0)
    optimizer.step()
    assert optimizer.learning_rate == 0.3
    changed = Prompt.model_validate(
        {"name": "a", "task": "t", "preset": "lester", "learning_rate": 0.1, "warmup_ratio": 0.1}
    )
    assert make_optimizer(changed, make_parameters(), 50).learning_rate == pytest.approx(0.1 / 6)
    assert changed.optimizer == "adafactor"
    for optimizer, rates in (("adafactor", (0.3, None)), ("adamw", (None, 0.1))):
        given = {"name": "a", "task": "t", "preset": "lester", "optimizer": optimizer}
        prompt = Prompt.model_validate(given)
        assert (prompt.learning_rate, prompt.relative_learning_rate) == rates
        assert prompt.max_grad_norm == (None if optimizer == "adafactor" else 1.0)
        assert (prompt.schedule, prompt.weight_decay) == ("constant", 1e-5)
        assert Prompt.model_validate(prompt.model_dump(mode="json")) == prompt
    with pytest.raises(ValidationError, match="optimizer sgd has no default"):
        Prompt.model_validate({"name": "a", "task": "t", "preset": "lester", "optimizer": "sgd"})
    assert Prompt.model_validate(changed.model_dump(mode="json")) == changed


def test_early_stopping() -> None:
    early = EarlyStopping(patience=2)
    accuracies = {10: (0.5, 1.0), 20: (0.5, 1.0), 30: (0.5, 0.9), 40: (0.9, 3.0)}
    accuracies |= {50: (0.8, 0.1), 60: (math.nan, 0.1)}
    seen = []
    for step, (accuracy, loss) in accuracies.items():
        key = score_key({"validation_accuracy": accuracy, "validation_loss": loss}, "accuracy")
        seen.append((early.update(step, key), early.should_stop))
    improved, stop = zip(*seen, strict=True)
    assert improved == (True, False, True, True, False, False), "equal is not an improvement"
    assert stop == (False, False, False, False, False, True)
    assert (early.best, early.best_step) == ((-0.9, 3.0), 40)


def test_early_stopping_without_patience_only_tracks() -> None:
    early = EarlyStopping()
    early.update(1, (0.5, 0.5))
    for step in range(2, 100):
        early.update(step, (1.0, 1.0))
    assert not early.should_stop
    assert early.best_step == 1


def test_early_stopping_resumes() -> None:
    losses = [math.nan, 1.0, 2.0, 0.9, 0.95, math.inf, 1.0]
    keys = [score_key({"validation_loss": loss}, "loss") for loss in losses]
    for cut in range(len(losses) + 1):
        straight, before = EarlyStopping(3), EarlyStopping(3)
        for step, key in enumerate(keys[:cut]):
            before.update(step, key)
        resumed = EarlyStopping(3)
        resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
        resumed.best = before.best
        for step, key in enumerate(keys):
            expected = straight.update(step, key)
            if step >= cut:
                assert resumed.update(step, key) == expected
        assert straight.should_stop
        assert resumed.should_stop
        assert resumed.state_dict() == straight.state_dict()
