"""How long packed batches are follows from one memory model and what is free."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.packing.activation_memory import (
    LEAST_TOKENS,
    RAMP,
    BatchMemory,
    LayerSizes,
    RowSizes,
    TokenBudget,
    choose_budget,
    row_sizes,
)

GB = 10**9
#: Llama-3-8B in bf16, slices of logits of 64 MB.
SIZES = LayerSizes(32, 4096, 32, 4096, 1024, 14336)
MEMORY = BatchMemory(SIZES, RowSizes(2.0, 300.0), 2, 64 << 20)


def test_recomputing_saves_one_hidden_state_per_layer() -> None:
    kept, again = MEMORY.saved(False), MEMORY.saved(True)
    assert kept - again == pytest.approx(32 * (MEMORY.layer() - 2 * 4096))
    assert 3e6 < kept < 6e6  # 3.2 to 5 MB a token
    assert MEMORY.peak(True) > again + MEMORY.layer()


def test_memory_grows_with_every_size() -> None:
    for changes in (
        {"mlp_width": 20_000},
        {"hidden": 5000},
        {"experts_per_token": 2},
        {"keeps_scores": True},
        {"norm_inputs": 4},
    ):
        other = replace(MEMORY, sizes=replace(SIZES, **changes))
        assert other.layer() > MEMORY.layer(), changes
    assert replace(MEMORY, rows=RowSizes(9.0, 300.0)).layer() > MEMORY.layer()


def test_rows_are_counted_with_their_prompt() -> None:
    short, long = row_sizes([10] * 50, 100), row_sizes([500], 100)
    assert short.keys_per_token > 11
    assert long.keys_per_token < 1.5
    assert long.keys_per_query > 600
    assert row_sizes([], 100) == RowSizes()


def test_a_packed_batch_fills_the_budget_and_never_exceeds_it() -> None:
    for checkpointing in (False, True):
        tokens = MEMORY.tokens(40 * GB, checkpointing)
        assert MEMORY.batch_bytes(tokens, checkpointing) <= 40 * GB
        assert MEMORY.batch_bytes(tokens + 2, checkpointing) > 40 * GB
    assert MEMORY.tokens(0, False) == LEAST_TOKENS


@pytest.mark.parametrize(
    ("room", "tokens", "checkpointing"),
    [
        (200, 10_000, False),  # all of a step in one packed batch
        (
            20,
            MEMORY.tokens(20 * GB, False),
            False,
        ),  # shorter packed batches, still worth their gathers
        (8, 10_000, True),  # 2,048 tokens do not fit unless layers are recomputed
        (1, MEMORY.tokens(1 * GB, True), True),
    ],
)
def test_auto(room: int, tokens: int, checkpointing: bool) -> None:
    budget = choose_budget(MEMORY, room * GB, 10_000)
    assert (budget.tokens, budget.checkpointing) == (tokens, checkpointing)
    assert budget.expected_bytes <= room * GB
    assert f"{tokens:,} tokens" in budget.description
    assert budget.description.endswith("on" if checkpointing else "off")


def test_explicit_budgets_are_kept() -> None:
    budget = choose_budget(MEMORY, GB, 10_000, tokens=7000, checkpointing=False, ramp=RAMP)
    assert (budget.tokens, budget.checkpointing, budget.now) == (7000, False, 7000)
    assert choose_budget(MEMORY, GB, 10_000, tokens=7000).checkpointing
    assert choose_budget(MEMORY, 200 * GB, 10_000, most=4096).tokens == 4096


def test_the_first_steps_confirm_the_estimate() -> None:
    budget = choose_budget(MEMORY, 200 * GB, 10_000, ramp=RAMP)
    assert budget.now == 2500
    assert not budget.confirm(10 * GB, 2500)  # 40 GB for 10,000
    assert budget.now == 5000
    assert budget.confirm(150 * GB, 5000)  # grows faster than thought: 200 GB hold 6,666
    assert budget.now == budget.tokens == 6666
    assert not budget.confirm(900 * GB, 5000)  # the ramp is over


def test_generation_is_limited_by_keys_and_values() -> None:
    """Recomputed layers save less per token than the keys and values of many heads take."""
    assert choose_budget(MEMORY, 200 * GB, 10_000).generation_tokens() == 40_000
    assert TokenBudget(1000).generation_tokens() == 4000
    as_many_heads = replace(MEMORY, sizes=replace(SIZES, key_width=4096))
    budget = choose_budget(as_many_heads, 8 * GB, 10_000)
    assert budget.checkpointing
    tokens = budget.generation_tokens()
    assert tokens < 4 * budget.tokens
    keys_and_values = 2 * 32 * 4096 * 2
    assert tokens * keys_and_values < 8 * GB
    assert budget.generation_tokens(spare=3.0) * 3 * keys_and_values < 8 * GB


def test_halving() -> None:
    budget = TokenBudget(1000, ramp=[0.5])
    budget.halve()
    assert (budget.tokens, budget.now) == (250, 250)
