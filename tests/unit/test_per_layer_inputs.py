"""Bases that do more with token ids than with embeddings: inputs per layer, scaled embeddings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.unsharded_base import load_shard, load_unsharded
from tests.family_bases import plain_model, problem, with_virtual_tokens
from trainer.model.families import FAMILIES
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.per_layer_inputs import id_rules
from trainer.model.prompted_model import HiddenStatesRequest
from trainer.packing.packed_batch import build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.peft_adapter import FixedText, save_peft
from trainer.prompts.soft_prompt import VirtualTokens

PER_LAYER = ["gemma3n", "gemma4-per-layer"]
IDS = torch.arange(7, 17)
PROMPT = torch.randn(5, 48, generator=torch.Generator().manual_seed(4)) * 0.3


@pytest.mark.parametrize("case", PER_LAYER)
def test_a_teacher_is_read_with_its_own_ids(family: Any, case: str) -> None:
    """The embeddings of a text with its ids are the text."""
    base = load_unsharded(family(case), "none")
    row = problem(base.hidden_size)[0][1].example
    text, rest = row.input_ids[:6], row.input_ids[6:]
    embedded = base(torch.tensor(text), []).embeddings_TH
    assert embedded is not None
    example = type(row).with_target(rest, row.target_start - 6, 0)
    batch = build_packed_batch([PackedRow(example, 0, 0)], [6])
    as_text = build_packed_batch([PackedRow(row, None, 0)], [])

    def states(batch: Any, prompts: list[Any]) -> Tensor:
        hidden: Tensor = base(HiddenStatesRequest(batch), prompts).hidden_NH
        return hidden

    wanted = states(as_text, [])
    torch.testing.assert_close(states(batch, [VirtualTokens(embedded, text)]), wanted)
    as_virtual_tokens = states(batch, [VirtualTokens(embedded)])
    assert (as_virtual_tokens - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("case", PER_LAYER)
@pytest.mark.parametrize("stored", ["keep", "int8"])
def test_ranks_hold_parts_of_the_table(family: Any, case: str, stored: str) -> None:
    """Of the table of the layers' inputs, as of the table of the embeddings."""
    base, *_ = load_shard(family(case), 1, 3, embeddings=stored, head=stored)
    tables = [m for m in base.model.modules() if isinstance(m, FrozenEmbedding)]
    assert len(tables) == 2
    for table in tables:
        assert table.rows is not None
        assert table.rows.dtype == (torch.int8 if stored == "int8" else torch.float32)
        assert len(table.rows) == -(-table.num_embeddings // 3)


def cards_code(folder: Path) -> list[str]:
    """The blocks of Python code in a model card after the first, which loads the model."""
    card = (folder / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1:]


@pytest.mark.parametrize("place", ["front", "in fixed text", "inside"])
@pytest.mark.parametrize("case", [*PER_LAYER, "falcon_h1", "llama"])
def test_the_model_card_says_how_peft_computes_the_same(
    family: Any, tmp_path: Path, case: str, place: str
) -> None:
    base = plain_model(family(case), "none")
    fixed, at = None, {"front": 0, "in fixed text": 2, "inside": 3}[place]
    if place == "in fixed text":
        inputs = with_virtual_tokens(base, IDS[:4], PROMPT[:0])
        fixed = FixedText((7, 8, 9, 10), 2, inputs["inputs_embeds"][0], ("a", "b"))
    save_peft(
        tmp_path,
        VirtualTokens(PROMPT),
        str(family(case)),
        num_layers=base.config.num_hidden_layers,
        num_attention_heads=4,
        fixed_text=fixed,
        inside=place == "inside",
        rules=id_rules(base.config),
    )
    wanted = base(**with_virtual_tokens(base, IDS, PROMPT, at), use_cache=False).logits
    names: dict[str, Any] = {"torch": torch, "base": base, "place": 3}
    names["model"] = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    names["input_ids"] = IDS[None] if fixed is None else IDS[None, 4:]
    blocks = cards_code(tmp_path)
    assert bool(blocks) == (case != "llama" or place == "inside")
    for block in blocks:
        exec(block.replace("base.generate(inputs_embeds=embeds)", ""), names)
    if "logits" in names:
        logits = names["logits"]
    elif "embeds" in names:
        logits = base(inputs_embeds=names["embeds"]).logits
    else:
        logits = names["model"](input_ids=names["input_ids"]).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_rules_of_other_families_are_empty(family: Any) -> None:
    assert FAMILIES["falcon_h1"].scale_of_ids
    rules = id_rules(plain_model(family("llama"), "none").config)
    assert rules.card(VirtualTokens(PROMPT), None, inside=False) == ""
