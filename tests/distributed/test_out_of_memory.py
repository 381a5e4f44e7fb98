"""A packed batch that does not fit is split in two where that is sound, else reported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(run_ranks: Callable[..., dict[str, Any]], random_base: Path) -> Any:
    """Results by number of ranks and size of the shard group."""
    groups = {1: ["1"], 2: ["1", "2"]}
    return functools.cache(
        lambda ranks: run_ranks("out_of_memory", ranks, str(random_base), *groups[ranks])
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_with_its_own_copy_splits_the_batch_and_continues(results: Any, ranks: int) -> None:
    result = results(ranks)["1"]
    assert result["digest_kept"]
    assert set(result["ways"]) == {"forward", "backward", "gather"}
    for way in result["ways"].values():
        losses, expected = way["losses"]
        assert losses == pytest.approx(expected, rel=1e-6)
        assert max(way["errors"]) < 1e-5
        first, after = way["splits"]
        assert first >= 1
        assert after == 0


def test_no_rank_of_several_retries_alone_before_training_is_traced(results: Any) -> None:
    assert results(2)["1"]["retries_untraced"] is False


def test_no_rank_of_several_retries_alone_after_decoding(results: Any) -> None:
    """DeepSpeed has recorded the order of a validation, and would record training in the retry."""
    assert results(2)["1"]["retries_retraced"] is False


def test_ranks_that_share_a_copy_report_the_remedy(results: Any) -> None:
    """The other ranks wait in this packed batch's gathers, so no rank can retry alone."""
    result = results(2)["2"]
    assert "set training.micro_batch_tokens=" in result["ways"]["forward"]["refusal"]
