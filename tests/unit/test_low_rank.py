"""Multitask prompt tuning against PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft import MultitaskPromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

from trainer.prompts.extended.low_rank import LowRankEncoder, SharedPrompt

P, H, R = 4, 16, 2


def words(count: int) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(0)) * 0.02


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
