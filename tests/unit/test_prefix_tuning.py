"""Prefix tuning in the packed batch, against PEFT on padded rows; every family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig
from torch import Tensor

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import (
    CASES,
    errors,
    family_config,
    padded_loss,
    plain_model,
    problem,
)
from tests.packed_step import WITHOUT, pasts, text_past
from tests.soft_prompts import soft_prompts
from trainer.inference.trained_prompts import load_prompts
from trainer.model.attention.prefix_cache import PastCache
from trainer.model.decode_step import DecodeStep
from trainer.model.families import FAMILIES, check_prefix_tuning
from trainer.model.prompted_model import PromptedBase
from trainer.packing.packed_batch import build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import PrefixKeyValues, prompt_lengths
from trainer.runtime.errors import BadInput

SOME = ["llama", "gpt2", "mistral", "gemma2", "gemma3", "bloom", "gpt_oss"]


def packed(
    base: PromptedBase, packed_rows: Sequence[PackedRow], values: Sequence[Tensor]
) -> tuple[list[float], list[Tensor]]:
    """Mean loss per label of each prompt that is read, and its gradient, from one packed batch."""
    leaves = [value.clone().requires_grad_() for value in values]
    prompts = soft_prompts(leaves)
    lengths = prompt_lengths(prompts)
    batch = build_packed_batch(packed_rows, lengths.tokens, lengths.past)
    nll_N = base(batch, prompts).losses.loss_N
    read = sorted(
        {packed_row.prompt for packed_row in packed_rows if packed_row.prompt is not None}
    )
    losses = torch.stack([nll_N[batch.label_prompt_N == k].mean() for k in read])
    losses.sum().backward()
    return losses.tolist(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def padded_peft(
    model: Any, adapter: Path, packed_rows: Sequence[PackedRow], past: Tensor
) -> tuple[float, Tensor]:
    """Loss and gradient of PEFT's PeftModel, loaded from what we export, on padded rows."""
    save_peft(adapter, PrefixKeyValues(past), "-", num_layers=0, num_attention_heads=0)
    peft = PeftModel.from_pretrained(model, adapter).eval()
    weight = peft.prompt_encoder["default"].embedding.weight.requires_grad_()
    loss = padded_loss(peft, [packed_row.example for packed_row in packed_rows])
    loss.backward()
    assert weight.grad is not None
    return loss.item(), weight.grad.view(past.shape)


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT])
def test_packed_equals_peft(family: Any, tmp_path: Path, case: str) -> None:
    base = load_unsharded(family(case), "int8", checkpointing=True)
    packed_rows, _ = problem(base.hidden_size)
    if case == "falcon-alibi":
        packed_rows = packed_rows[:2]
    prompts = pasts(base)
    losses, gradients = packed(base, packed_rows, prompts)
    model = plain_model(family(case), "int8")
    files: Any = SimpleNamespace(config=model.config.get_text_config(), name=case)
    for k, past in enumerate(prompts):
        own = [packed_row for packed_row in packed_rows if packed_row.prompt == k]
        loss, gradient = padded_peft(model, tmp_path / str(k), own, past)
        assert losses[k] == pytest.approx(loss, rel=1e-5)
        assert errors([gradients[k]], [gradient])[0] < 1e-5
        (loaded,) = load_prompts([tmp_path / str(k)], files, torch.device("cpu"))
        assert torch.equal(loaded.tensor, past)


@pytest.mark.parametrize("case", WITHOUT)
def test_other_families_are_refused_with_the_reason(case: str) -> None:
    config = family_config(case)
    reason = re.escape(FAMILIES[config.model_type].no_prefix_tuning)
    with pytest.raises(BadInput, match=f"prefix_tuning cannot train .*{reason}.*use prompt_tuning"):
        check_prefix_tuning(config, "m")


def test_padded_families_are_refused() -> None:
    assert {"mpt", "xglm", "doge", "deepseek_v2", "diffllama", "bamba"} <= set(WITHOUT)
    assert all(family.no_prefix_tuning for family in FAMILIES.values() if not family.packed)
    check_prefix_tuning(family_config("llama"), "m")


@pytest.mark.parametrize("case", SOME)
class TestBank:
    def test_mixed_with_virtual_tokens_in_one_packed_batch(self, family: Any, case: str) -> None:
        """A packed batch of virtual tokens, prefixes and bare rows equals each alone."""
        base = load_unsharded(family(case), "int8", checkpointing=True)
        rows, soft = problem(base.hidden_size)
        prompts = [soft[0], pasts(base)[0], soft[1], pasts(base)[1]]
        packed_rows = [PackedRow(rows[i % len(rows)].example, i % 4, i) for i in range(12)]
        bare = [PackedRow(rows[0].example, None, 12)]
        losses, gradients = packed(base, packed_rows + bare, prompts)
        for k in range(4):
            own = [packed_row for packed_row in packed_rows if packed_row.prompt == k]
            (loss,), (gradient,) = packed(base, own, prompts)
            assert losses[k] == pytest.approx(loss, rel=1e-5)
            assert errors([gradients[k]], [gradient])[0] < 1e-5

    @pytest.mark.parametrize("diverged", [0, 1])
    def test_a_diverged_prompt_does_not_change_the_others(
        self, family: Any, case: str, diverged: int
    ) -> None:
        base = load_unsharded(family(case), "int8")
        packed_rows, soft = problem(base.hidden_size)
        prompts = [pasts(base)[0], soft[1]]
        prompts[diverged].fill_(torch.nan)
        leaves = [prompt.requires_grad_() for prompt in prompts]
        lengths = prompt_lengths(soft_prompts(leaves))
        batch = build_packed_batch(packed_rows, lengths.tokens, lengths.past)
        nll_N = base(batch, soft_prompts(leaves)).losses.loss_N
        nll_N.sum().backward()
        assert nll_N[batch.label_prompt_N == diverged].isnan().all()
        assert nll_N[batch.label_prompt_N != diverged].isfinite().all()
        gradient = leaves[1 - diverged].grad
        assert gradient is not None
        assert gradient.isfinite().all()

    def test_decoding_equals_peft(self, family: Any, tmp_path: Path, case: str) -> None:
        """Two rows of different lengths behind a prefix, padded on the left, two steps."""
        base = load_unsharded(family(case), "none", checkpointing=True)
        packed_rows, _ = problem(base.hidden_size)
        past = pasts(base)[1]
        rows = [list(packed_row.example.input_ids) for packed_row in packed_rows[:2]]
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest + len(past) - pad) for pad in pads])
        cache = PastCache()
        save_peft(tmp_path, PrefixKeyValues(past), "-", num_layers=0, num_attention_heads=0)
        peft = PeftModel.from_pretrained(plain_model(family(case), "none"), tmp_path).eval()
        with torch.no_grad(), base.unpacked():
            first = base(DecodeStep(ids, mask, cache), [PrefixKeyValues(past)]).logits_BV
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            step = DecodeStep(torch.full((2, 1), 7), mask, cache)
            second = base(step, [PrefixKeyValues(past)]).logits_BV
            for i, row in enumerate(rows):
                wanted = peft(input_ids=torch.tensor([[*row, 7]])).logits[0]
                torch.testing.assert_close(first[i], wanted[-2], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(second[i], wanted[-1], rtol=1e-4, atol=1e-4)

    def test_keys_and_values_of_a_text_equal_the_text(self, family: Any, case: str) -> None:
        """Where a model does no more than attend to what came before, both prompts are one."""
        base = load_unsharded(family(case), "none")
        packed_rows, _ = problem(base.hidden_size)
        ids = [17, 5, 44, 9, 120]
        words = base(torch.tensor(ids), []).embeddings_TH
        as_tokens, _ = packed(base, packed_rows, [words, words])
        past = text_past(base, ids)
        as_past, _ = packed(base, packed_rows, [past, past])
        assert as_past == pytest.approx(as_tokens, rel=1e-5)


def test_bf16(family: Any) -> None:
    base = load_unsharded(family("llama"), "int8", dtype=torch.bfloat16)
    packed_rows, _ = problem(base.hidden_size)
    exact = load_unsharded(family("llama"), "int8")
    losses, gradients = packed(base, packed_rows, pasts(exact))
    assert losses == pytest.approx(packed(exact, packed_rows, pasts(exact))[0], rel=0.05)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_what_the_export_holds(tmp_path: Path) -> None:
    past = torch.randn(5, 3, 2, 2, 8)
    save_peft(tmp_path, PrefixKeyValues(past), "base", num_layers=3, num_attention_heads=4)
    config = PrefixTuningConfig.from_pretrained(tmp_path)
    assert config.peft_type == "PREFIX_TUNING"
    # Of the cache: two heads of keys, though the base has four of queries.
    assert (config.num_attention_heads, config.token_dim, config.num_layers) == (2, 16, 3)
    assert not config.prefix_projection
    card = (tmp_path / "README.md").read_text()
    assert "tags: [prefix-tuning, promptshard]" in card
    assert "5 virtual tokens of width 16 as keys and values in each of 3 layers" in card
