"""Text that rows or candidates share is read once: likelihoods are those of separate texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import scoring
from benchmarks.random_base import make_tokenizer, save_random
from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import CASES, VOCAB_SIZE, WINDOW
from tests.one_rank import OneRank
from tests.packed_step import WITHOUT, pasts
from tests.soft_prompts import soft_prompts
from tests.unit.test_evaluation import load
from trainer.data.token_table import Example
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.model.families import FAMILIES
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.packed_batch import build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import prompt_lengths

EOS = 2
#: One token; two that begin alike; one that begins with another; one longer than a window.
TARGETS = [(7,), (9, 4), (9, 5), (9, 5, 6), tuple(range(10, 12 + WINDOW))]
#: Tokens that all rows begin with.
BEGINNING = (20, 21, 22)


def rows(targets: Sequence[tuple[int, ...]], eos: tuple[int, ...] = ()) -> list[list[Example]]:
    """Candidates of rows that are shorter and longer than a window."""
    generator = torch.Generator().manual_seed(5)
    scored_rows = []
    for number, length in enumerate((3, 2 * WINDOW, WINDOW, 1, 9)):
        own = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        text = (*BEGINNING, *own)
        scored_rows.append(
            [Example.with_target((*text, *t, *eos), len(text), number) for t in targets]
        )
    return scored_rows


def likelihoods(
    base: PromptedBase, packed_rows: Sequence[PackedRow], values: Sequence[Tensor], num_slots: int
) -> Tensor:
    """Negative log-likelihood of every slot, from one packed batch."""
    prompts = soft_prompts(values)
    lengths = prompt_lengths(prompts)
    batch = build_packed_batch(packed_rows, lengths.tokens, lengths.past)
    assert len(batch.token_ids_T) == sum(segment.length for segment in batch.segments)
    with torch.no_grad():
        nll_N = base(batch, prompts).losses.loss_N
    return torch.zeros(num_slots).index_add_(0, batch.label_slot_N, nll_N)


def both_forms(rows: Sequence[Sequence[Example]], num_prompts: int) -> list[list[PackedRow]]:
    """Rows with all their candidates, and each candidate after a copy of the row's text.

    Every row is read without a prompt and after each prompt; every other row shares its beginning.
    """
    shared: list[PackedRow] = []
    alone: list[PackedRow] = []
    for prompt in (None, *range(num_prompts)):
        for number, row in enumerate(rows):
            slot, beginning = len(alone), number % 2 * len(BEGINNING)
            shared.append(PackedRow(row[0], prompt, slot, candidates=tuple(row), shared=beginning))
            alone += [PackedRow(example, prompt, slot + i) for i, example in enumerate(row)]
    return [shared, alone]


def prompts_of(base: PromptedBase, case: str) -> list[Tensor]:
    """Virtual tokens and, where the family can read them, keys and values."""
    tokens = torch.randn(5, base.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.3
    return [tokens] if case in WITHOUT else [tokens, pasts(base)[1]]


@pytest.mark.parametrize("case", CASES)
def test_candidates_are_as_likely_as_each_alone(family: Any, case: str) -> None:
    base = load_unsharded(family(case), "int8")
    prompts = prompts_of(base, case)
    shared, alone = both_forms(rows(TARGETS, (EOS,)), len(prompts))
    actual = likelihoods(base, shared, prompts, len(alone))
    wanted = likelihoods(base, alone, prompts, len(alone))
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    assert actual.std() > 0.5, "the candidates differ"


def test_candidates_of_one_token_after_a_prompt_at_the_end(family: Any) -> None:
    """Without EOS, such a packed batch has the segments of prompts only."""
    base = load_unsharded(family("llama"), "int8")
    prompts = [torch.randn(5, base.hidden_size, generator=torch.Generator().manual_seed(1))]
    candidates = [Example((3, 4, label), ((2, 3),), 0, 2, 2) for label in (7, 9)]
    shared = [PackedRow(candidates[0], 0, 0, candidates=tuple(candidates))]
    alone = [PackedRow(example, 0, slot) for slot, example in enumerate(candidates)]
    actual, wanted = (likelihoods(base, some, prompts, 2) for some in (shared, alone))
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("budget", "packed"), [(1000, True), (24, True), (1, True), (24, False)])
def test_a_row_with_more_candidates_than_a_packed_batch_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, packed: bool
) -> None:
    """Scores are the same, whatever the number of packed batches that a row's candidates take."""
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], packed=packed))
    tokenizer = make_tokenizer()
    choices = [f"w{i} w{i + 1}" for i in range(20, 50)]
    rows = [{"text": "w3 w4 w5 w6 w7", "label": choices[2]}, {"text": "w8", "label": choices[0]}]
    task = {"input": "{text}", "target": " {label}", "choices": choices, "metric": "accuracy"}
    validation = load(tmp_path, rows, tokenizer, **task).evaluation["validation"]
    base = load_unsharded(save_random(tmp_path / "base"), "none")
    (scored,) = Evaluator(
        OneRank(),  # type: ignore[arg-type]
        base,
        tokenizer,
        TokenBudget(budget),
    ).score([Request(validation, None)], [])
    alone = [
        PackedRow(example, None, slot)
        for slot, example in enumerate(e for row in validation.candidates for e in row)
    ]
    wanted = likelihoods(base, alone, [], len(alone)).view(2, len(choices)).double()
    assert scored.nll_RC is not None
    torch.testing.assert_close(scored.nll_RC, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2])
def test_eight_choices_cost_little_more_than_one(family: Callable[..., Path], tokens: int) -> None:
    """FLOPs of rows of 60 tokens, in a base whose last layer, which computes less, is one of 12."""
    base = load_unsharded(family("llama", 12), "int8")
    prompts = soft_prompts([torch.zeros(scoring.VIRTUAL, base.hidden_size)])
    one, eight = (
        scoring.count(base, scoring.once(scoring.made_up_rows(n, tokens, 12), 0), prompts)
        for n in (1, scoring.CHOICES)
    )
    assert one.total < eight.total <= scoring.REACH * one.total
