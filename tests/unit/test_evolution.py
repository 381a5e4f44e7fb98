"""The search for words: the best of all that was tried, by no more than its generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from trainer.prompts.evolution import Found, Words, search, together

WORDS, LENGTH = 50, 10
#: The base does its task best behind these words; each that is in its place helps.
BEST = tuple(range(LENGTH))
BEGIN_WITH = [("a text", (7,) * LENGTH), ("another", (3,) * LENGTH)]


def loss(words: Words) -> float:
    return float(sum(a != b for a, b in zip(words, BEST, strict=True)))


def begin(seed: int, drawings: int = 14) -> tuple[object, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[int]:
        return torch.randint(WORDS, (LENGTH,), generator=generator).tolist()

    starts = BEGIN_WITH + [(f"drawing {n}", tuple(draw())) for n in range(drawings)]
    return search(starts, draw, generator), generator


def run(seeds: Sequence[int]) -> tuple[dict[int, Found], list[tuple[int, Words]]]:
    seen: list[tuple[int, Words]] = []

    def judge(asked: Sequence[tuple[int, Words]]) -> list[float]:
        seen.extend(asked)
        return [loss(words) for _, words in asked]

    return together({seed: begin(seed)[0] for seed in seeds}, judge), seen  # type: ignore[misc]


def test_the_best_of_all_that_was_tried() -> None:
    found, seen = run(range(20))
    for seed, of in found.items():
        tried = [words for i, words in seen if i == seed]
        assert of.tried == len(tried) == 16 + 6 * 8
        assert of.loss == loss(of.words) == min(map(loss, tried))
        first = sorted(map(loss, tried[:16]))
        assert (of.first, of.middle) == (first[0], first[8])
    better = [of.first - of.loss for of in found.values()]
    assert min(better) >= 0
    assert sum(better) / len(better) > 1, "crossing finds what no drawing had"


def test_children_are_of_the_best_and_a_few_drawn_words() -> None:
    _, seen = run([1])
    tried = [words for _, words in seen]
    for done in range(16, len(tried), 8):
        best = sorted(range(done), key=lambda n: (loss(tried[n]), n))[:3]
        for child in tried[done : done + 8]:
            inherited = sum(word in {tried[n][i] for n in best} for i, word in enumerate(child))
            assert inherited >= LENGTH - 4


def test_side_by_side_is_as_alone() -> None:
    many, _ = run([4, 2, 9])
    for seed, of in many.items():
        assert run([seed])[0] == {seed: of}


def test_what_is_best_from_the_start_stays() -> None:
    one, _ = begin(0)

    def judge(asked: Sequence[tuple[int, Words]]) -> list[float]:
        return [1.0 if words == BEGIN_WITH[1][1] else math.inf for _, words in asked]

    found = together({0: one}, judge)[0]  # type: ignore[dict-item]
    assert (found.words, found.what, found.loss) == (BEGIN_WITH[1][1], "another", 1.0)
    assert found.middle == math.inf


@pytest.mark.parametrize("number", [1, 2])
def test_of_one_or_two_starts(number: int) -> None:
    """A task with nothing to begin with but a drawing or two."""
    generator = torch.Generator().manual_seed(0)
    starts = BEGIN_WITH[:number]
    found = together(
        {0: search(starts, lambda: [1] * LENGTH, generator)},
        lambda asked: [loss(words) for _, words in asked],
    )
    assert found[0].tried == number + 48
    assert found[0].loss <= min(loss(words) for _, words in starts)
