"""Encoders: PEFT's shapes and numbers, deterministic starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixEncoder, PrefixTuningConfig, PromptEncoderConfig
from peft import PromptEncoder as PeftEncoder

from trainer.config import Prompt
from trainer.prompts.encoders import (
    EmbeddingEncoder,
    EncoderInputs,
    MLPEncoder,
    PromptEncoder,
)
from trainer.prompts.extended.lstm import LSTMEncoder
from trainer.prompts.extended.prefix_mlp import PrefixMLPEncoder
from trainer.prompts.extended.residual import ResidualEncoder
from trainer.training.prompt_optimizer import make_optimizer

P, H, E = 5, 8, 12


def make_init() -> torch.Tensor:
    return torch.randn(P, H, generator=torch.Generator().manual_seed(0))


def make_encoder(
    prompt: Prompt, init: torch.Tensor, generator: torch.Generator, hidden_size: int
) -> Any:
    vocabulary: Any = None
    inputs = EncoderInputs(prompt, hidden_size, generator, vocabulary, lambda: init, {})
    return prompt.entry.load_builder()(inputs)


def make_mlp(seed: int = 0) -> MLPEncoder:
    return MLPEncoder(make_init(), E, torch.Generator().manual_seed(seed))


def make_lstm(seed: int = 0) -> LSTMEncoder:
    return LSTMEncoder(make_init(), E, torch.Generator().manual_seed(seed))


def make_peft(kind: str = "MLP") -> PeftEncoder:
    return PeftEncoder(
        PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            token_dim=H,
            num_transformer_submodules=1,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=E,
        )
    )


@pytest.mark.parametrize("batched", [False, True])
def test_mlp_equals_peft_forward_and_backward(batched: bool) -> None:
    ours, theirs = make_mlp(), make_peft()
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
    ours, theirs = make_mlp(), make_peft()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(), theirs(torch.arange(P)))


def test_lstm_equals_peft_forward_and_backward() -> None:
    ours, theirs = make_lstm(), make_peft("LSTM")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    out, reference = ours(), theirs(torch.arange(P)[None])[0]
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-6)
    gradient = torch.randn(P, H)
    out.backward(gradient)
    reference.backward(gradient)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6, msg=name)


def test_lstm_start() -> None:
    before = torch.get_rng_state()
    encoder = make_lstm()
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    rms = make_init().square().mean().sqrt()
    torch.testing.assert_close(encoder.embedding.weight, make_init() / rms)
    assert torch.equal(make_lstm()(), encoder())
    assert not torch.equal(make_lstm(seed=1)(), encoder())
    weights = torch.cat([weight.flatten() for weight in encoder.lstm_head.parameters()])
    assert weights.abs().max() <= E**-0.5
    torch.testing.assert_close(weights.std(), torch.tensor((3 * E) ** -0.5), rtol=0.1, atol=0)


def make_residual(separate: bool = False) -> ResidualEncoder:
    return ResidualEncoder(make_init(), 3, torch.Generator().manual_seed(0), separate=separate)


@pytest.mark.parametrize("separate", [False, True])
def test_residual_is_the_paper_s_formula(separate: bool) -> None:
    """embedding + LayerNorm(up(relu(down(embedding)))), written with torch's own modules."""
    encoder = make_residual(separate)
    with torch.no_grad():
        encoder.norm_gain.normal_()
        encoder.norm_bias.normal_()
    rows = []
    for p, embedding_H in enumerate(encoder.embedding):
        m = p if separate else 0
        mlp = torch.nn.Sequential(
            torch.nn.Linear(H, 3), torch.nn.ReLU(), torch.nn.Linear(3, H), torch.nn.LayerNorm(H)
        )
        weights = (
            encoder.down[m].T,
            encoder.down_bias[m, 0],
            encoder.up[m].T,
            encoder.up_bias[m, 0],
            encoder.norm_gain[m, 0],
            encoder.norm_bias[m, 0],
        )
        names = [name for name, _ in mlp.named_parameters()]
        made = torch.func.functional_call(mlp, dict(zip(names, weights, strict=True)), embedding_H)
        rows.append(embedding_H + made)
    expected = torch.stack(rows)
    torch.testing.assert_close(encoder(), expected, rtol=0, atol=1e-6)
    gradient = torch.randn(P, H)
    parameters = list(encoder.parameters())
    ours, theirs = (torch.autograd.grad(o, parameters, gradient) for o in (encoder(), expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_residual_starts_at_its_embedding_and_every_weight_learns(separate: bool) -> None:
    encoder = make_residual(separate)
    assert torch.equal(encoder(), make_init())
    assert len(encoder.down) == (P if separate else 1)
    start = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        encoder().sin().sum().backward()
        optimizer.step()
    still = [n for n, value in encoder.named_parameters() if torch.equal(value, start[n])]
    assert still == []


def test_mlp_start() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    encoder = make_mlp()
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    rms = make_init().square().mean().sqrt()
    torch.testing.assert_close(encoder.embedding.weight, make_init() / rms)
    torch.manual_seed(2)
    assert torch.equal(make_mlp()(), encoder())
    assert not torch.equal(make_mlp(seed=1)(), encoder())
    # torch's own start for nn.Linear: uniform within 1/sqrt(in_features).
    reference = torch.nn.Linear(400, 300)
    ours = MLPEncoder(torch.ones(1, 400), 300, torch.Generator().manual_seed(0)).mlp_head[0]
    assert isinstance(ours, torch.nn.Linear)
    for a, b in ((ours.weight, reference.weight), (ours.bias, reference.bias)):
        assert a.abs().max() <= 1 / 20
        torch.testing.assert_close(a.std(), b.std(), rtol=0.15, atol=0)


def similar_tokens(num_tokens: int, hidden_size: int) -> torch.Tensor:
    """Embeddings like those of a text, which have a part in common."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(1, hidden_size, generator=generator)
    return 0.1 * (common + torch.randn(num_tokens, hidden_size, generator=generator))


def test_hidden_units_of_the_mlp_are_standardized_over_the_tokens() -> None:
    encoder = MLPEncoder(similar_tokens(20, 64), 96, torch.Generator().manual_seed(0))
    for depth in (1, 3):
        drawn_PE = encoder.mlp_head[:depth](encoder.embedding.weight).detach()
        bound = drawn_PE.mean(0).abs().max()
        assert bound <= 1 / 64**0.5, "more than torch's bias"
        assert float((drawn_PE - drawn_PE.mean(0)).square().mean()) == pytest.approx(1, rel=1e-4)


def test_the_first_update_of_the_mlp_moves_each_token_along_its_gradient() -> None:
    """Adam's first update; with torch's initialization, the cosine is 0.27."""
    init = similar_tokens(20, 64)
    encoder = MLPEncoder(init, 64, torch.Generator().manual_seed(0))
    encoder.start_at(init)
    gradient = torch.randn(init.shape, generator=torch.Generator().manual_seed(1))
    before = encoder()
    before.backward(gradient)
    with torch.no_grad():
        for parameter in encoder.parameters():
            assert parameter.grad is not None
            parameter -= 1e-5 * parameter.grad.sign()
        moved = encoder() - before
    cosine = torch.nn.functional.cosine_similarity(-moved.flatten(), gradient.flatten(), dim=0)
    assert float(cosine) > 0.45


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_equal_tokens_leave_the_mlp_as_drawn(num_tokens: int) -> None:
    init = similar_tokens(1, 64).expand(num_tokens, 64).clone()
    encoder = MLPEncoder(init, 64, torch.Generator().manual_seed(0))
    encoder.start_at(init)
    torch.testing.assert_close(encoder(), init)
    assert all(parameter.abs().max() <= 1 for parameter in encoder.mlp_head.parameters())


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


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "residual"])
def test_an_encoder_initially_produces_its_init(encoder: str) -> None:
    def made(**settings: Any) -> torch.Tensor:
        prompt = p_tuning(encoder, **settings)
        return make_encoder(prompt, make_init(), torch.Generator().manual_seed(0), H)()

    trained = made(init={"from": "runs/other"})
    torch.testing.assert_close(trained, make_init(), rtol=1e-4, atol=1e-5)
    # Of an LSTM only the input starts where init says, unless that is a trained prompt.
    assert torch.equal(made(), trained) == (encoder != "lstm")


def p_tuning(encoder: str, **settings: Any) -> Prompt:
    settings |= {"method": "p_tuning", "encoder": encoder, "encoder_hidden_size": E}
    return Prompt.model_validate({"name": "a", "task": "t", **settings})


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("encoder", ["residual", "mlp"])
def test_an_update_of_one_scale_moves_the_prompt_by_its_root_mean_square(
    encoder: str, size: float
) -> None:
    """Where all parameters of the last layer, or the embeddings, move alike."""
    made = make_encoder(p_tuning(encoder), make_init() * size, torch.Generator().manual_seed(0), H)
    with torch.no_grad():
        start, scale, parameters = made(), made.scale(), dict(made.named_parameters())
        last = max((n for n in parameters if n.startswith("mlp_head")), default="embedding")
        parameters[last] += scale
        if last != "embedding":
            parameters[last.replace("weight", "bias")] += scale
        moved = float((made() - start).abs().mean())
    assert moved == pytest.approx(float(start.square().mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "kind", "size"),
    [
        ({"encoder": "lstm"}, LSTMEncoder, H),
        ({"encoder": "lstm", "encoder_hidden_size": E}, LSTMEncoder, E),
        ({"encoder": "residual"}, ResidualEncoder, H // 4),
        ({"encoder": "residual", "encoder_hidden_size": E}, ResidualEncoder, E),
    ],
)
def test_run_file_chooses_among_p_tuning_s(
    settings: dict[str, Any], kind: type[PromptEncoder], size: int
) -> None:
    prompt = Prompt(name="a", task="t", method="p_tuning", **settings)
    encoder = make_encoder(prompt, make_init(), torch.Generator().manual_seed(0), H)
    assert isinstance(encoder, kind)
    shapes = {name: value.shape for name, value in encoder.named_parameters()}
    wide = shapes["down"][2] if kind is ResidualEncoder else shapes["lstm_head.weight_hh_l0"][1]
    assert wide == size


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


def test_prefix_mlp_initially_produces_its_init() -> None:
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


@pytest.mark.parametrize("num_layers", [1, 4, 30])
def test_each_layer_of_a_prefix_moves_relative_to_its_own_keys_and_values(num_layers: int) -> None:
    sizes_L2 = torch.rand(num_layers, 2, generator=torch.Generator().manual_seed(1)) + 0.01
    init = sizes_L2[None, :, :, None, None] * torch.ones(P, num_layers, 2, 2, 4)
    init[0] = 100.0  # an attention sink
    prompt = Prompt(name="a", task="t", method="prefix_tuning", warmup_ratio=0, max_grad_norm=None)
    encoder = make_encoder(prompt, init, torch.Generator().manual_seed(0), H)
    optimizer = make_optimizer(prompt, dict(encoder.named_parameters()), 9, encoder.scale())
    encoder.embedding.grad = torch.randn(init.shape, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    moved_L2 = (encoder() - init).detach().square().mean((0, 3, 4)).sqrt()
    torch.testing.assert_close(moved_L2, 0.1 * sizes_L2 / num_layers**0.5, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rate", [{}, {"learning_rate": 0.01}], ids=["relative", "absolute"])
def test_a_resumed_prefix_keeps_the_learning_rates_of_its_layers(rate: dict[str, Any]) -> None:
    prompt = Prompt(name="a", task="t", method="prefix_tuning", **rate)

    def make(init: torch.Tensor) -> tuple[Any, Any]:
        encoder = make_encoder(prompt, init, torch.Generator().manual_seed(0), H)
        parameters = dict(encoder.named_parameters())
        return encoder, make_optimizer(prompt, parameters, 9, encoder.scale())

    def train(encoder: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            encoder.embedding.grad = torch.randn(make_past().shape, generator=generator)
            optimizer.step()

    whole, stopped = make(make_past()), make(make_past())
    train(*whole, range(6))
    train(*stopped, range(3))
    resumed = make(7 * make_past().abs())  # the start of a resumed prompt is another one
    resumed[0].load_state_dict(stopped[0].state_dict())
    resumed[1].load_state_dict(stopped[1].state_dict())
    train(*resumed, range(3, 6))
    assert torch.equal(whole[0](), resumed[0]())
