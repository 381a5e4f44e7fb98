"""The search for words: the best of all that was tried, by no more than its generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from trainer.prompts.init_search import SearchResult, Words, search, search_together

WORDS, LENGTH = 50, 10
#: The base does its task best behind these words; each that is in its place helps.
BEST = tuple(range(LENGTH))
BEGIN_WITH = [("a text", (7,) * LENGTH), ("another", (3,) * LENGTH)]


def loss(words: Words) -> float:
    return float(sum(a != b for a, b in zip(words, BEST, strict=True)))


def begin(seed: int, drawings: int = 14) -> tuple[object, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Words:
        return tuple(torch.randint(WORDS, (LENGTH,), generator=generator).tolist())

    starts = BEGIN_WITH + [(f"drawing {n}", draw()) for n in range(drawings)]
    return search(starts, draw, generator), generator


def run(seeds: Sequence[int]) -> tuple[dict[int, SearchResult], list[tuple[int, Words]]]:
    seen: list[tuple[int, Words]] = []

    def judge(asked: Sequence[tuple[int, Words]]) -> list[float]:
        seen.extend(asked)
        return [loss(words) for _, words in asked]

    return search_together({seed: begin(seed)[0] for seed in seeds}, judge), seen  # type: ignore[misc]


def test_the_best_candidate_is_returned() -> None:
    result, seen = run(range(20))
    for seed, of in result.items():
        tried = [words for i, words in seen if i == seed]
        assert len(tried) == 16 + 6 * 8
        assert of.tried == len(set(tried)) >= len(tried) - 2, "hardly any is asked twice"
        assert of.loss == loss(of.words) == min(map(loss, tried))
        first = sorted(map(loss, tried[:16]))
        assert (of.first, of.middle) == (first[0], first[8])
    better = [of.first - of.loss for of in result.values()]
    assert min(better) >= 0
    assert sum(better) / len(better) > 1, "crossing finds what no drawing had"


def test_children_are_of_the_best_and_a_few_drawn_words() -> None:
    _, seen = run([1])
    tried = [words for _, words in seen]
    inherited = []
    for done in range(16, len(tried), 8):
        best = sorted(range(done), key=lambda n: (loss(tried[n]), n))[:3]
        for child in tried[done : done + 8]:
            kept = [word in {tried[n][i] for n in best} for i, word in enumerate(child)]
            inherited.append(sum(kept))
    assert min(inherited) >= LENGTH - 5
    assert LENGTH * 0.85 < sum(inherited) / len(inherited) < LENGTH


def test_a_search_beside_others_equals_one_alone() -> None:
    many, _ = run([4, 2, 9])
    for seed, of in many.items():
        assert run([seed])[0] == {seed: of}


def test_a_best_initial_candidate_is_kept() -> None:
    one, _ = begin(0)

    def judge(asked: Sequence[tuple[int, Words]]) -> list[float]:
        return [1.0 if words == BEGIN_WITH[1][1] else math.inf for _, words in asked]

    result = search_together({0: one}, judge)[0]  # type: ignore[dict-item]
    assert (result.words, result.what, result.loss) == (BEGIN_WITH[1][1], "another", 1.0)
    assert result.middle == math.inf


def test_children_do_not_depend_on_which_parent_is_best() -> None:
    """Losses that differ in their last digits give the same result."""
    good = [words for _, words in BEGIN_WITH]

    def asked_where(better: Words) -> list[Words]:
        asked: list[Words] = []

        def judge(starts: Sequence[tuple[int, Words]]) -> list[float]:
            words = [words for _, words in starts]
            asked.extend(words)
            return [0.0 if w == better else 1e-6 if w in good else 10 + loss(w) for w in words]

        one, _ = begin(3)
        search_together({0: one}, judge)  # type: ignore[dict-item]
        return asked

    assert asked_where(good[0]) == asked_where(good[1])


@pytest.mark.parametrize(("number", "length"), [(1, 10), (2, 10), (2, 1)])
def test_searches_with_few_candidates_and_few_tokens(number: int, length: int) -> None:
    """What was tried is not asked again."""
    generator = torch.Generator().manual_seed(0)
    starts = [(what, words[:length]) for what, words in BEGIN_WITH[:number]]
    asked: list[Words] = []

    def draw() -> Words:
        return tuple(torch.randint(10**9, (length,), generator=generator).tolist())

    def judge(tried: Sequence[tuple[int, Words]]) -> list[float]:
        asked.extend(words for _, words in tried)
        return [float(sum(words)) for _, words in tried]

    result = search_together({0: search(starts, draw, generator)}, judge)
    assert len(asked) == len(set(asked)) == result[0].tried == number + 48
    assert result[0].loss == min(map(sum, asked))
