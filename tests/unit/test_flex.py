"""FlexAttention against the buckets: outputs and gradients, in torch's eager form on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import errors, problem, save_family
from tests.packed_attention import HEADS, SCORES, SEGMENTS, TOKENS, attended, tensors
from tests.packed_step import WITHOUT, pasts
from tests.unit.test_prefix_tuning import packed
from trainer.model.attention import flex
from trainer.model.attention.bucket_layout import Scores
from trainer.model.attention.interface import resolve_attention
from trainer.packing.packed_row import PackedRow
from trainer.runtime.errors import BadInput


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enable the eager backward, which torch refuses to run on a CPU."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


def test_segments_cover_the_packed_batch() -> None:
    assert sum(segment.length for segment in SEGMENTS) == TOKENS


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("kind", SCORES)
def test_equals_buckets(kind: str, kv_heads: int) -> None:
    leaves = tensors(kv_heads)
    output, gradients = attended(True, leaves, SCORES[kind])
    wanted, wanted_gradients = attended(False, leaves, SCORES[kind])
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_values_of_another_size_than_keys() -> None:
    leaves = tensors(2, value_size=12)
    output, gradients = attended(True, leaves, SCORES["window"])
    wanted, wanted_gradients = attended(False, leaves, SCORES["window"])
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-5, atol=1e-5)


def test_attention_sinks_use_bucketed_attention() -> None:
    leaves = tensors(2)
    scores = Scores(0.3, sinks_A=torch.randn(HEADS))
    assert torch.equal(attended(True, leaves, scores)[0], attended(False, leaves, scores)[0])


@pytest.mark.parametrize("lost", [0, 4], ids=["tokens", "prefix"])
def test_a_diverged_prompt_does_not_change_the_others(lost: int) -> None:
    """NaN in one prompt: its readers are NaN, all else is as it was, gradients too."""
    clean = tensors(2)
    wanted, wanted_gradients = attended(True, clean, SCORES["plain"])
    leaves = tensors(2)
    with torch.no_grad():
        if lost == 0:  # the first prompt, whose tokens are in the packed batch
            leaves[1][:, :, 2] = torch.nan
            readers = [*range(5), *range(8, 15), *range(195, 201)]
        else:  # the second prefix
            leaves[4][0] = torch.nan
            readers = list(range(169, 189))
    output, gradients = attended(True, leaves, SCORES["plain"])
    is_lost = torch.zeros(TOKENS, dtype=torch.bool)
    is_lost[readers] = True
    assert output[0, is_lost].isnan().all()
    torch.testing.assert_close(output[0, ~is_lost], wanted[0, ~is_lost])
    assert all(gradient.isfinite().all() for gradient in gradients)
    for gradient, expected in zip(gradients[:3], wanted_gradients[:3], strict=True):
        torch.testing.assert_close(gradient[:, :, ~is_lost], expected[:, :, ~is_lost])
    torch.testing.assert_close(gradients[3], wanted_gradients[3])


def test_many_compiled_forms() -> None:
    """More than the 8 after which torch runs a function uncompiled."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def function(x: Tensor, form: str) -> Tensor:
        return x + len(form)

    call = flex.compile_forms(function, backend=backend)
    forms = ["-" * i for i in range(12)]
    for _ in range(2):
        assert [int(call(torch.zeros(1), form)) for form in forms] == list(range(12))
    assert len(graphs) == len(forms)


def compiled(function: Callable[..., Any], _: str) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager")


@pytest.mark.parametrize(
    "case", ["llama", "gemma2", "falcon-alibi", "gptj", "gpt_oss", "deepseek_v2"]
)
def test_flex_and_bucketed_attention_agree_in_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Through whole models, recomputed in backward: two prompts of tokens, and two prefixes."""
    if case == "gemma2":
        # As on a GPU, but for the kernel: torch's eager form cannot recompute a capped score.
        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
        monkeypatch.setattr(flex, "_compiled", functools.cache(compiled))
    base = load_unsharded(save_family(tmp_path, case), "int8", checkpointing=True)
    rows, soft = problem(base.hidden_size)
    prompts = soft if case in WITHOUT else [*soft, *pasts(base)]
    packed_rows = [PackedRow(rows[i % len(rows)].example, i % len(prompts), i) for i in range(8)]
    wanted, wanted_gradients = packed(base, packed_rows, prompts)
    base.flex = True
    losses, gradients = packed(base, packed_rows, prompts)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert max(errors(gradients, wanted_gradients)) < 1e-5


def test_refused_where_it_has_no_backward() -> None:
    cpu = torch.device("cpu")
    assert not resolve_attention("auto", cpu, packed=True)
    with pytest.raises(BadInput, match=r"engine\.attention: flex.*use sdpa or auto"):
        resolve_attention("flex", cpu, packed=True)
    gpu = torch.device("cuda", 0)
    assert resolve_attention("flex", gpu, packed=True)
    with pytest.raises(BadInput, match="those of this base are padded"):
        resolve_attention("flex", gpu, packed=False)
