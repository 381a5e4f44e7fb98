"""Invariant 4: a prompt trained in a bank equals the same prompt, or its share, trained alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.bank import PROMPTS


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)
    for task in ("x", "y"):
        lines = [
            {
                "text": " ".join(
                    f"w{draw.randrange(3, 300)}" for _ in range(draw.randrange(3, 20))
                ),
                "label": f"w{draw.randrange(3, 300)} w{draw.randrange(3, 300)}",
            }
            for _ in range(20)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def one_and_two_ranks(
    run_ranks: Callable[..., dict[str, Any]], random_base: Path, rows: Path
) -> list[dict[str, Any]]:
    return [run_ranks("bank", ranks, str(random_base), str(rows)) for ranks in (1, 2)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_prompt_in_a_bank_of_nine_equals_the_same_alone(
    one_and_two_ranks: list[dict[str, Any]], ranks: int
) -> None:
    result = one_and_two_ranks[ranks - 1]
    assert result["errors"].keys() == {prompt["name"] for prompt in PROMPTS}
    assert max(result["errors"].values()) < 1e-5, result["errors"]
    if (
        ranks == 2
    ):  # one step of all prompts gathers the base once per packed batch, not once per prompt
        assert 0 < result["gathered"] < result["gathered_alone"]


def test_searched_initializations_do_not_depend_on_bank_or_ranks(
    one_and_two_ranks: list[dict[str, Any]],
) -> None:
    one, two = one_and_two_ranks
    assert one["starts"].keys() == {"open", "brief", "prefix", "prefix-mlp"}
    assert one["starts"] == one["starts_alone"] == two["starts"] == two["starts_alone"]
