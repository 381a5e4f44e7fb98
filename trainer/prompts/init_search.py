"""Which words a prompt starts from where the run file leaves it open: a small genetic search.

Drawn words differ widely in how well the base does its task behind them, and what makes some better
can be combined: of the best prompts so far two are crossed, word by word, and a few words drawn
again (a genetic search over prompts, as GPS has it, arXiv 2210.17041, with words in place of
sentences). It needs forwards alone, and no row that the prompt's first update does not read.

Searches run side by side, a round of all prompts at a time: each by its own generator, so that a
prompt finds in a bank what it finds alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch

#: Drawings of words that a search begins with.
DRAWINGS = 16
#: Rounds after them, prompts made in each, and how many of the best they are made of.
ROUNDS, CHILDREN, PARENTS = 6, 8, 3
#: Share of a child's words that are drawn again.
MUTATED = 0.1
#: A search over fewer prompts than this is left out: drawn words alone hardly differ from chance.
FEWEST = 8

#: One word, as its token id, for each virtual token.
Words = tuple[int, ...]
#: Asks for the losses of prompts of words, and gives the best of all in the end.
Search = Generator[Sequence[Words], Sequence[float], "SearchResult"]


@dataclass(frozen=True)
class SearchResult:
    """The best start of a search.

    Attributes:
        what: where it came from, in words.
        loss: its mean loss per label; ``first`` and ``middle``: of what the search began with the
            least, and the one in the middle.
        tried: different prompts whose loss was asked for.
    """

    words: Words
    what: str
    loss: float
    first: float
    middle: float
    tried: int


@dataclass(frozen=True)
class Extent:
    """How many prompts a search tries: known ones, drawings, then rounds of ``CHILDREN``."""

    known: int
    drawings: int
    rounds: int

    @property
    def prompts(self) -> int:
        return self.known + self.drawings + self.rounds * CHILDREN


def extent(budget: int, known: int) -> Extent | None:
    """Size of a search that tries at most ``budget`` prompts; None below ``FEWEST``.

    The first half of the budget goes to known prompts and drawings, the rest to rounds.

    Args:
        known: prompts that the task suggests: hard prompts and labels.
    """
    if budget < FEWEST:
        return None
    known = min(known, budget)
    begin = min(known + DRAWINGS, max(known, budget // 2))
    rounds = min(ROUNDS, (budget - begin) // CHILDREN)
    return Extent(known, min(DRAWINGS, budget - known - rounds * CHILDREN), rounds)


def search(
    begin_with: Sequence[tuple[str, Words]],
    draw: Callable[[], Words],
    generator: torch.Generator,
    rounds: int = ROUNDS,
) -> Search:
    """The search of one prompt.

    Args:
        begin_with: prompts of equal length, and what each is.
        draw: as many words, at random.
        rounds: generations of ``CHILDREN`` prompts each.
    """
    tried: dict[Words, _Tried] = {}
    yield from _ask(begin_with, tried)
    losses = sorted(one.loss for one in tried.values())
    first, middle = losses[0], losses[len(losses) // 2]
    for _ in range(rounds):
        parents = sorted(tried, key=lambda words: tried[words].rank)[:PARENTS]
        # In the order in which they were found: which of them is best, often by very little, does
        # not affect the children.
        parents.sort(key=lambda words: tried[words].number)
        children: list[Words] = []
        for _ in range(CHILDREN):
            drawn = draw()
            child = _child(parents, drawn, generator)
            place = int(torch.randint(len(drawn), (), generator=generator))
            if child in tried or child in children:  # nothing is asked twice
                child = (*child[:place], drawn[place], *child[place + 1 :])
            children.append(child)
        yield from _ask([("words of several starts", words) for words in children], tried)
    best = min(tried, key=lambda words: tried[words].rank)
    return SearchResult(best, tried[best].what, tried[best].loss, first, middle, len(tried))


@dataclass(frozen=True)
class _Tried:
    what: str
    loss: float
    number: int

    @property
    def rank(self) -> tuple[float, int]:
        """Of equal losses the one that was found first."""
        return self.loss, self.number


def _ask(
    starts: Sequence[tuple[str, Words]], tried: dict[Words, _Tried]
) -> Generator[Sequence[Words], Sequence[float], None]:
    losses = yield [words for _, words in starts]
    for (what, words), loss in zip(starts, losses, strict=True):
        tried.setdefault(words, _Tried(what, loss, len(tried)))


def _child(parents: Sequence[Words], drawn: Words, generator: torch.Generator) -> Words:
    """Each word of one of two parents, or in a few places a drawn one."""
    pair = torch.randperm(len(parents), generator=generator)[:2].tolist()
    length = len(drawn)
    which = torch.randint(len(pair), (length,), generator=generator).tolist()
    redrawn = (torch.rand(length, generator=generator) < MUTATED).tolist()
    return tuple(drawn[i] if redrawn[i] else parents[pair[which[i]]][i] for i in range(length))


def search_together(
    searches: Mapping[int, Search],
    judge: Callable[[Sequence[tuple[int, Words]]], Sequence[float]],
) -> dict[int, SearchResult]:
    """Run the searches of several prompts side by side.

    Args:
        judge: losses of prompts of words, each beside whose start it may be.
    """
    asked = {i: next(one) for i, one in searches.items()}
    results: dict[int, SearchResult] = {}
    while asked:
        all_words = [(i, words) for i, several in asked.items() for words in several]
        losses = iter(judge(all_words))
        given = {i: [next(losses) for _ in several] for i, several in asked.items()}
        asked = {}
        for i, values in given.items():
            try:
                asked[i] = searches[i].send(values)
            except StopIteration as ended:
                results[i] = ended.value
    return results
