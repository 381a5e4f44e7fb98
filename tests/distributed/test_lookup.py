"""Row exchange of word embeddings: exact values, and no more bytes than the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_base import llama_config, save_random

VOCAB_SIZE, HIDDEN = 301, 64  # blocks of the last ranks are not full
GROUPS = {"world": None, "pairs": 2, "copies": 1, "offload": None, "int8": 2}


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def ranks(
    request: pytest.FixtureRequest,
    run_ranks: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    config = llama_config(vocab_size=VOCAB_SIZE, tie_word_embeddings=False, num_hidden_layers=2)
    folder: Path = save_random(tmp_path_factory.mktemp("untied") / "base", config)
    return run_ranks("lookup", request.param, str(folder))["ranks"]


@pytest.mark.parametrize("way", GROUPS)
class TestLookup:
    def test_looked_up_rows_equal_the_table_exactly(self, ranks: Any, way: str) -> None:
        assert all(all(rank[way]["equal"]) for rank in ranks)

    def test_each_rank_holds_a_block_and_zero3_none(self, ranks: Any, way: str) -> None:
        size = GROUPS[way] or len(ranks)
        for rank in ranks:
            assert rank[way]["block"] == [-(-VOCAB_SIZE // size), HIDDEN]
            assert rank[way]["type"] == ("torch.int8" if way == "int8" else "torch.float32")
            assert not rank[way]["table_is_a_parameter"]
            assert rank[way]["digest_kept"]

    def test_bytes_of_a_lookup_are_counts_ids_and_rows(self, ranks: Any, way: str) -> None:
        for rank in ranks:
            assert rank[way]["lookup_bytes"] == rank[way]["expected_lookup_bytes"]
            assert (rank[way]["lookup_bytes"] == 0) == (GROUPS[way] == 1)

    def test_bytes_of_a_step_are_all_layers_once_and_rows(self, ranks: Any, way: str) -> None:
        for rank in ranks:
            assert rank[way]["gathered"] == rank[way]["expected_gathered"]
            # Else nothing here would show that a fetched table stays until the step ends.
            assert rank[way]["table_fetched"] or GROUPS[way] == 1

    def test_training_and_generation_are_unchanged_by_row_exchange(
        self, ranks: Any, way: str
    ) -> None:
        expected = ranks[0]["copies"]  # where each rank has the whole table
        near = 0.03 if way == "int8" else 1e-6
        for rank in ranks:
            assert rank[way]["losses"] == pytest.approx(expected["losses"], rel=near)
            assert max(rank[way]["gradient_errors"]) < 10 * near
            if way != "int8":
                assert rank[way]["texts"] == expected["texts"]
            assert any(rank[way]["texts"])

    def test_a_base_for_inference_that_fits_is_gathered_once_and_has_no_hooks(
        self, ranks: Any, way: str
    ) -> None:
        for rank in ranks:
            assert rank[way]["texts_of_resident"] == rank[way]["texts"]
            assert rank[way]["gathered_by_resident"] == 0
            assert not rank[way]["resident_has_hooks"]
            assert rank[way]["lean_has_hooks"] == (GROUPS[way] != 1), "does not fit"


def test_stored_and_read_bytes_are_divided_among_ranks(ranks: Any) -> None:
    for rank in ranks:
        full = rank["copies"]
        for way, size in (("world", len(ranks)), ("pairs", 2)):
            # Scales are held by all; the last row of a part may be read by two.
            assert rank[way]["base_bytes"] < full["base_bytes"] / size + 12_000
            assert rank[way]["bytes_read"] <= 1.02 * full["bytes_read"] / size
