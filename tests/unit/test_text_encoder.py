"""The text encoder: attention over a text, transfer to new texts, and the weights that are kept."""

from __future__ import annotations

import json

import pytest
import torch

from trainer.checkpointing.state_tensors import join_tensors, split_tensors
from trainer.prompts.text_encoder import BestEncoder, TextEncoder, TextReader

P, H, E = 4, 16, 12


def words(count: int, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)) * scale


def make_reader(seed: int = 0, num_virtual_tokens: int = P) -> TextReader:
    return TextReader(num_virtual_tokens, H, E, torch.Generator().manual_seed(seed))


def test_reader_is_attention_with_its_values_added() -> None:
    reader, words_nH = make_reader(), words(7)
    with torch.no_grad():
        reader.output.weight.normal_()
        reader.output.bias.normal_()
    normed = torch.nn.LayerNorm(H, elementwise_affine=False)(words_nH)
    places = torch.tensor(
        [
            [f(i / 10_000 ** (j / (E // 2))) for f in (torch.sin, torch.cos) for j in range(E // 2)]
            for i in torch.arange(7.0)
        ]
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    keys, values = reader.keys(normed) + places, reader.values(normed)
    skip, read = (attend(reader.queries[None], keys[None], v[None])[0] for v in (words_nH, values))
    expected = skip + reader.output(torch.nn.functional.gelu(read))
    torch.testing.assert_close(reader(words_nH), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.02, 1.0])
@pytest.mark.parametrize("count", [1, 12, 60])
def test_what_is_read_is_about_as_loud_as_words(scale: float, count: int) -> None:
    reader = make_reader(num_virtual_tokens=40)
    words_nH = words(count, scale)
    made = TextEncoder(reader, words_nH)()
    assert made.shape == (40, H)
    ratio = made.square().mean().sqrt() / words_nH.square().mean().sqrt()
    assert 0.4 < ratio < 1.3
    if count > 1:
        assert len(made.round(decimals=5).unique(dim=0)) == 40, "virtual tokens are alike"


def test_a_text_is_not_a_bag_of_words() -> None:
    reader, words_nH = make_reader(), words(6)
    assert not torch.allclose(reader(words_nH), reader(words_nH.flip(0)), atol=1e-4)


def test_start_depends_on_the_generator_alone_and_the_words_are_frozen() -> None:
    before = torch.get_rng_state()
    encoder = TextEncoder(make_reader(), words(5))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert torch.equal(encoder(), TextEncoder(make_reader(), words(5))())
    assert not torch.equal(encoder(), TextEncoder(make_reader(1), words(5))())
    assert all(name.startswith("shared.") for name, _ in encoder.named_parameters())
    assert "words_nH" not in encoder.state_dict()


def test_what_two_texts_taught_is_read_from_a_third() -> None:
    """Targets are a rotation of each text's mean word: a reader can learn it, a prompt cannot."""
    rotation, _ = torch.linalg.qr(torch.randn(H, H, generator=torch.Generator().manual_seed(3)))
    texts = [words(6, 1.0, seed) for seed in range(24)]
    reader = make_reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=0.01)

    def error(words_nH: torch.Tensor) -> torch.Tensor:
        return (reader(words_nH) - words_nH.mean(0) @ rotation).square().mean()

    unseen = [words(6, 1.0, seed) for seed in range(100, 108)]
    with torch.no_grad():
        before = sum(error(text) for text in unseen)
    for _ in range(150):
        optimizer.zero_grad()
        torch.stack([error(text) for text in texts]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = sum(error(text) for text in unseen)
    assert after < 0.7 * before


def best_of(weights: list[float]) -> BestEncoder:
    return BestEncoder(lambda: {"w": torch.tensor(weights[-1])})


def test_the_mean_metric_decides_then_the_mean_loss() -> None:
    weights = [0.0]
    best = best_of(weights)
    for step, keys in enumerate(
        [
            {"a": (-0.5, 2.0), "b": (-0.5, 2.0)},
            {"a": (-0.9, 4.0), "b": (-0.3, 4.0)},  # more accurate on average
            {"a": (-0.6, 0.1), "b": (-0.5, 0.1)},  # the lowest loss
            {"a": (-0.6, 3.0), "b": (-0.6, 3.0)},  # as accurate as the best, lower loss
        ],
        1,
    ):
        weights.append(float(step))
        best.update(step, keys)
    state = best.state_dict()
    assert (state["w"], state["step"]) == (4.0, 4)
    again = best_of(weights)
    tensors, rest = split_tensors(state)
    again.load_state_dict(join_tensors(tensors, json.loads(json.dumps(rest))))
    assert again.state_dict() == state


def test_a_state_of_a_version_that_ranked_by_loss_is_continued() -> None:
    old = {"step": 3, "loss": 1.5, "losses": {"a": 1.0, "b": 2.0}}
    by_loss = best_of([7.0])
    by_loss.load_state_dict({**old, "w": torch.tensor(3.0)})
    by_loss.update(4, {"a": (1.1, 1.1)})
    assert by_loss.state_dict()["w"] == 3.0, "the mean loss is higher than before"
    by_accuracy = best_of([7.0])
    by_accuracy.load_state_dict({**old, "w": torch.tensor(3.0)})
    by_accuracy.update(4, {"a": (-0.1, 9.0), "b": (-0.1, 9.0)})
    assert by_accuracy.state_dict()["w"] == 7.0
