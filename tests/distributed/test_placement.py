"""Shard groups, kept layers and CPU offload change where the base is stored, and no number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RANKS = 4


@pytest.fixture(scope="module")
def results(run_ranks: Callable[..., dict[str, Any]], random_base: Path) -> dict[str, Any]:
    return run_ranks("placement", RANKS, str(random_base))


def test_every_placement_gives_the_same_losses_and_gradients(results: dict[str, Any]) -> None:
    for rank in results["ranks"]:
        for way in rank.values():
            assert way["losses"] == pytest.approx(rank["world"]["losses"], abs=1e-6)
            assert max(way["gradient_errors"]) < 1e-6
            assert way["digest_kept"]
        for name, way in rank.items():
            assert way["shares_memory"] == ("shared" in name)


def test_two_groups_of_two_hold_a_copy_each(results: dict[str, Any]) -> None:
    groups = [rank["pairs"]["group"] for rank in results["ranks"]]
    assert groups == [[0, 1], [0, 1], [2, 3], [2, 3]]  # no weight goes from one to the other
    for rank in results["ranks"]:
        full = rank["copies"]["layer_bytes"] + rank["copies"]["table_bytes"]
        scales = rank["copies"]["base_bytes"] - full
        for way, size in (("world", RANKS), ("pairs", 2), ("copies", 1)):
            share = full / size
            assert rank[way]["base_bytes"] - scales == pytest.approx(share, rel=1e-3)
            assert rank[way]["bytes_read"] <= 1.01 * rank["copies"]["bytes_read"] / size


def test_bytes_per_rank_are_known_before_loading(results: dict[str, Any]) -> None:
    for rank in results["ranks"]:
        for way in ("world", "pairs", "copies", "lean", "shared", "shared pairs"):
            assert rank[way]["base_bytes"] == rank[way]["expected_bytes"]


def test_kept_parameters_are_gathered_once_per_step(results: dict[str, Any]) -> None:
    for rank in results["ranks"]:
        sizes = {"world": RANKS, "pairs": 2, "copies": 1, "shared": RANKS, "shared pairs": 2}
        for way, size in sizes.items():
            from_others = rank[way]["layer_bytes"] * (size - 1) // size
            assert rank[way]["gathered"] == [from_others] * 3
            # Word embeddings and hidden states of labels, one table at the most twice over.
            assert max(rank[way]["exchanged"]) <= 2 * rank[way]["table_bytes"] * (size - 1) // size
            assert (min(rank[way]["exchanged"]) > 0) == (size > 1)
        assert min(rank["lean"]["gathered"]) > 1.9 * rank["world"]["gathered"][0]
        assert rank["shared lean"]["gathered"] == rank["lean"]["gathered"]


def test_two_layers_are_gathered_at_a_time(results: dict[str, Any]) -> None:
    for rank in results["ranks"]:
        for way in ("lean", "shared lean"):  # norms stay; one parameter beyond the limit
            assert 2 <= rank[way]["live_layers"] < 2.5
        assert rank["world"]["live_layers"] == 3  # all are kept


def test_a_group_that_does_not_divide_the_ranks_is_refused(results: dict[str, Any]) -> None:
    assert "engine.shard_group: 3 does not divide the 4 ranks" in results["refusal"]
