"""Every family: packed and frozen against plain transformers, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.family_bases import (
    CASES,
    errors,
    plain_model,
    problem,
    row_by_row,
    save_family,
)
from trainer.base.families import FAMILIES
from trainer.base.files import open_base
from trainer.base.loading import load_base
from trainer.base.model import DecodeStep, PromptedBase
from trainer.base.skeleton import build_skeleton
from trainer.config import Base
from trainer.tasks.streams import build_stream

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in saved:
            saved[case] = save_family(tmp_path_factory.mktemp(case), case)
        return saved[case]

    return get


def load(
    folder: Path, quantization: str, checkpointing: bool = False, dtype: torch.dtype = torch.float32
) -> PromptedBase:
    settings = Base(model=str(folder), quantization=quantization)
    files = open_base(settings)
    skeleton = build_skeleton(files, settings, dtype, CPU)
    base, _ = load_base(
        skeleton,
        files,
        dtype=dtype,
        device=CPU,
        shard=lambda _: None,
        checkpointing=checkpointing,
    )
    return base


def packed(base: PromptedBase) -> tuple[list[float], list[Tensor]]:
    """Mean loss per label of each prompt and its gradient, from one stream."""
    pieces, prompts = problem(base.hidden_size)
    leaves = [prompt.requires_grad_() for prompt in prompts]
    stream = build_stream(pieces, [len(leaf) for leaf in leaves])
    nll_N = base(stream, leaves)
    losses = torch.stack([nll_N[stream.label_prompt_N == k].mean() for k in range(len(leaves))])
    losses.sum().backward()
    return losses.tolist(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_every_family_of_the_table_is_compared():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
class TestFamily:
    @pytest.mark.parametrize(("quantization", "checkpointing"), [("int8", False), ("none", True)])
    def test_packed_equals_plain(
        self, folder: Any, case: str, quantization: str, checkpointing: bool
    ) -> None:
        base = load(folder(case), quantization, checkpointing)
        losses, gradients = packed(base)
        pieces, prompts = problem(base.hidden_size)
        expected, wanted = row_by_row(plain_model(folder(case), quantization), pieces, prompts)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert max(errors(gradients, wanted)) < 1e-5

    def test_decoding_equals_plain(self, folder: Any, case: str) -> None:
        """Two rows of different lengths behind a prompt, padded on the left, two steps."""
        base, model = load(folder(case), "none"), plain_model(folder(case), "none")
        pieces, prompts = problem(base.hidden_size)
        rows = [list(piece.example.input_ids) for piece in pieces[:2]]
        longest, prompt = max(map(len, rows)), prompts[1]
        pads = [longest - len(row) for row in rows]
        ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest + len(prompt) - pad) for pad in pads])
        cache = DynamicCache()
        with torch.no_grad(), base.unpacked():
            first = base(DecodeStep(ids, mask, cache), [prompt])
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            second = base(DecodeStep(torch.full((2, 1), 7), mask, cache), [prompt])
            for i, row in enumerate(rows):
                words = model.get_input_embeddings()(torch.tensor([[*row, 7]]))
                embeds = torch.cat([prompt[None], words], dim=1)
                wanted = model(inputs_embeds=embeds, use_cache=False).logits[0]
                torch.testing.assert_close(first[i], wanted[-2], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(second[i], wanted[-1], rtol=1e-4, atol=1e-4)
