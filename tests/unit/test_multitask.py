"""Encoders that prompts share: PEFT's multitask prompts, and reading a text."""

from __future__ import annotations

import pytest
import torch
from peft import MultitaskPromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

from trainer.prompts.multitask import LowRankEncoder, SharedPrompt, TextEncoder, TextReader

P, H, E, R = 4, 16, 12, 2


def words(count: int, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)) * scale


def make_reader(seed: int = 0, num_virtual_tokens: int = P) -> TextReader:
    return TextReader(num_virtual_tokens, H, E, torch.Generator().manual_seed(seed))


def test_low_rank_is_peft_s_multitask_prompt() -> None:
    settings = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        token_dim=H,
        num_tasks=2,
        num_ranks=R,
        num_transformer_submodules=1,
    )
    theirs = MultitaskPromptEmbedding(settings, torch.nn.Embedding(9, H))
    shared = SharedPrompt(theirs.embedding.weight.detach())
    for task in range(2):
        ours = LowRankEncoder(shared, R, torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours.columns.copy_(theirs.prefix_task_cols[task])
            ours.rows.copy_(theirs.prefix_task_rows[task])
            expected = theirs(torch.arange(P)[None], torch.tensor([task]))[0]
        torch.testing.assert_close(ours(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_starts_at_the_shared_prompt_and_every_part_learns(rank: int) -> None:
    encoder = LowRankEncoder(SharedPrompt(words(P)), rank, torch.Generator().manual_seed(0))
    assert torch.equal(encoder(), words(P))
    start = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (encoder() + 1).square().sum().backward()
        optimizer.step()
    for name, value in encoder.named_parameters():
        ranks = (value != start[name]).any(1 if name == "rows" else 0)
        assert bool(ranks.any() if name == "shared.embedding" else ranks.all()), name


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
