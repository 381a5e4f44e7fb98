"""Invariants 1, 2, 3, 6: only prompts change; packed = padded; ranks, splits do not matter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = [(2, "int8:no"), (2, "none:yes"), (1, "int8:yes")]  # ranks, quantization:checkpointing


@pytest.fixture(scope="module")
def result(
    run_ranks: Callable[..., dict[str, Any]], random_base: Path
) -> Callable[..., dict[str, Any]]:
    """Launch once per number of ranks."""

    @functools.cache
    def launch(ranks: int) -> dict[str, Any]:
        cases = [way for number, way in CASES if number == ranks]
        return run_ranks("equivalence", ranks, str(random_base), *cases)

    return lambda ranks, way: launch(ranks)[way]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
class TestEquivalence:
    @pytest.fixture
    def measured(self, result: Callable[..., dict[str, Any]], case: tuple[int, str]) -> Any:
        return result(*case)

    @pytest.mark.fault("ranks with unequal numbers of rows, or none")
    @pytest.mark.parametrize("rows", ["all_rows", "one_row", "apart"])
    def test_packed_equals_peft_on_padded_rows(self, measured: Any, rows: str) -> None:
        """Loss and gradient of PEFT's PeftModel in fp32: all prompts, one row, a prompt per rank.

        With two ranks, one row leaves a rank without rows, and of the two rows that are apart one
        rank reads virtual tokens, the other keys and values.
        """
        step = measured[rows]
        assert len(step["losses"]) == {"all_rows": 3, "one_row": 1, "apart": 2}[rows]
        assert min(step["peft_losses"]) > 1, "random weights predict no label"
        assert step["losses"] == pytest.approx(step["peft_losses"], abs=1e-5)
        for ours, peft in zip(step["gradients"], step["peft_gradients"], strict=True):
            ours, peft = torch.tensor(ours), torch.tensor(peft)
            largest = peft.abs().max().item()
            torch.testing.assert_close(ours, peft, rtol=0, atol=1e-5 * largest)
        assert step["skipped"] == [False, False, False]

    def test_any_split_into_batches_gives_the_same_gradient(self, measured: Any) -> None:
        assert max(measured["split_errors"]) < 1e-5

    def test_hooks_do_not_list_the_parameters_of_a_layer_again(self, measured: Any) -> None:
        assert measured["listed_layers"] == []

    @pytest.mark.fault("base weights change or receive gradients")
    def test_base_is_the_checkpoint_s_and_never_changes(self, measured: Any) -> None:
        assert measured["weights_equal"]
        assert measured["digest_kept"]

    def test_base_bytes_are_divided_among_ranks(self, measured: Any) -> None:
        # Scales and norms, a few per cent on this small model, are held by every rank.
        share = measured["full_bytes"] / measured["world_size"]
        assert max(measured["base_bytes"]) <= 1.05 * share + 12_000

    def test_ranks_fill_no_shared_memory(self, measured: Any) -> None:
        assert measured["shared_files"] == [[]] * measured["world_size"]

    def test_ranks_do_not_load_mlflow(self, measured: Any) -> None:
        assert measured["mlflow_loaded"] == [False] * measured["world_size"]

    @pytest.mark.fault("loss is NaN on one rank only")
    def test_nan_on_one_rank_skips_that_prompt_on_all(
        self, measured: Any, case: tuple[int, str]
    ) -> None:
        if case[0] == 1:
            assert not any(measured["nan_skipped"])  # the poison is for rank 1
            return
        assert measured["ranks_agree"]
        assert measured["nan_skipped"] == [False, True, False]
        assert measured["nan_gradients"] == [False, True, False]
        assert measured["nan_other_loss"] == pytest.approx(measured["losses"][0], abs=1e-6)


def test_two_ranks_equal_one(result: Callable[..., dict[str, Any]]) -> None:
    two, one = result(2, "int8:no"), result(1, "int8:yes")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
