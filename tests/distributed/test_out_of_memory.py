"""A stream that does not fit is cut in two where that is sound, and told about where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_with_a_copy_of_its_own_splits_and_goes_on(
    run_ranks: Callable[..., dict[str, Any]], random_base: Path, ranks: int
) -> None:
    found = run_ranks("out_of_memory", ranks, str(random_base), "1")
    assert found["digest_kept"]
    assert set(found["ways"]) == {"forward", "backward"}
    for way in found["ways"].values():
        losses, expected = way["losses"]
        assert losses == pytest.approx(expected, abs=1e-6)
        assert max(way["errors"]) < 1e-5
        first, after = way["splits"]
        assert first >= 1
        assert after == 0


def test_ranks_that_share_a_copy_are_told_the_remedy(
    run_ranks: Callable[..., dict[str, Any]], random_base: Path
) -> None:
    """Others wait in this stream's gathers: nobody can go back alone."""
    found = run_ranks("out_of_memory", 2, str(random_base), "2")
    assert "set training.micro_batch_tokens=" in found["ways"]["forward"]["refusal"]
