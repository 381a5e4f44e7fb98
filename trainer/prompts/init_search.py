"""``init: auto`` and ``init: search``: choose the initial tokens of a prompt by their loss.

``auto`` takes the best of the task's hand-written prompts, or its ``system`` text. On language
models, a prompt that starts from an instruction learns faster than one that starts from the tokens
with the lowest loss. Tasks without a text are searched, as with ``search``.

The search is genetic. The base model's loss differs widely between random token sequences before a
row, and good sequences can be combined: two of the best candidates so far are crossed token by
token, and a few tokens are redrawn (like GPS, arXiv 2210.17041, with tokens instead of sentences).
The search needs forward passes only, over the rows of the prompt's first update.

Searches of several prompts advance together, one round at a time. Each has its own generator, so
the result for a prompt does not depend on the other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from trainer.config import Init, Prompt, RunConfig
from trainer.data.row_validation import label_texts
from trainer.prompts.initializers import Vocabulary, hand_written_starts, initial_token_ids

#: Random candidates in the first round.
DRAWINGS = 16
#: Rounds after the first, candidates per round, and parents that they are made from.
ROUNDS, CHILDREN, PARENTS = 6, 8, 3
#: Share of a child's tokens that are redrawn.
MUTATED = 0.1
#: Minimum number of candidates; with fewer, a search is hardly better than a random draw.
FEWEST = 8

#: Token ids of a candidate, one per virtual token.
Words = tuple[int, ...]
#: Yields candidates, receives their losses, and returns the best candidate.
Search = Generator[Sequence[Words], Sequence[float], "SearchResult"]


@dataclass(frozen=True)
class SearchResult:
    """Best candidate of a search.

    Attributes:
        words: token ids of the best candidate.
        what: description of its origin.
        loss: its mean loss per label, in nats.
        first, middle: lowest and median loss of the first round.
        tried: number of distinct candidates that were scored.
        rounds: number of rounds of the genetic search after the first.
    """

    words: Words
    what: str
    loss: float
    first: float
    middle: float
    tried: int
    rounds: int


@dataclass(frozen=True)
class Extent:
    """Number of candidates: known ones, random ones, then rounds of ``CHILDREN``."""

    known: int
    drawings: int
    rounds: int

    @property
    def prompts(self) -> int:
        return self.known + self.drawings + self.rounds * CHILDREN


def extent(budget: int, known: int) -> Extent | None:
    """Plan a search of at most ``budget`` candidates; None below ``FEWEST``.

    Half of the budget is for random candidates and the ``known`` ones of the task, the rest for the
    rounds.
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
    """Search initial tokens for one prompt, as the generator ``Search``.

    Args:
        begin_with: candidates of equal length, each with a description.
        draw: draws a random candidate of this length.
        rounds: number of rounds of ``CHILDREN`` candidates.
    """
    tried: dict[Words, _Tried] = {}
    yield from _ask(begin_with, tried)
    losses = sorted(one.loss for one in tried.values())
    first, middle = losses[0], losses[len(losses) // 2]
    for _ in range(rounds):
        parents = sorted(tried, key=lambda words: tried[words].rank)[:PARENTS]
        # Sorted by order of scoring, so that rounding differences in losses do not change children.
        parents.sort(key=lambda words: tried[words].number)
        children: list[Words] = []
        for _ in range(CHILDREN):
            drawn = draw()
            child = _child(parents, drawn, generator)
            place = int(torch.randint(len(drawn), (), generator=generator))
            if child in tried or child in children:  # score no candidate twice
                child = (*child[:place], drawn[place], *child[place + 1 :])
            children.append(child)
        yield from _ask([("words of several starts", words) for words in children], tried)
    best = min(tried, key=lambda words: tried[words].rank)
    return SearchResult(best, tried[best].what, tried[best].loss, first, middle, len(tried), rounds)


@dataclass(frozen=True)
class _Tried:
    what: str
    loss: float
    number: int

    @property
    def rank(self) -> tuple[float, int]:
        """Sort key: loss, then order of scoring."""
        return self.loss, self.number


def _ask(
    starts: Sequence[tuple[str, Words]], tried: dict[Words, _Tried]
) -> Generator[Sequence[Words], Sequence[float], None]:
    losses = yield [words for _, words in starts]
    for (what, words), loss in zip(starts, losses, strict=True):
        tried.setdefault(words, _Tried(what, loss, len(tried)))


def _child(parents: Sequence[Words], drawn: Words, generator: torch.Generator) -> Words:
    """Take each token from one of two parents, or in a few places from ``drawn``."""
    pair = torch.randperm(len(parents), generator=generator)[:2].tolist()
    length = len(drawn)
    which = torch.randint(len(pair), (length,), generator=generator).tolist()
    redrawn = (torch.rand(length, generator=generator) < MUTATED).tolist()
    return tuple(drawn[i] if redrawn[i] else parents[pair[which[i]]][i] for i in range(length))


def search_together(
    searches: Mapping[int, Search],
    judge: Callable[[Sequence[tuple[int, Words]]], Sequence[float]],
) -> dict[int, SearchResult]:
    """Run searches (by prompt), one round of all at a time; ``judge`` returns the losses."""
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


class InitScorer(Protocol):
    """Scores candidates; see ``trainer.training.init_scoring``."""

    def losses(
        self, starts: Sequence[tuple[int, Words]], embed: Callable[[Sequence[int]], Tensor]
    ) -> list[float]:
        """Compute the mean loss of each candidate, as the prompt of the given index.

        ``embed`` looks up token embeddings [n, H]; it may be a collective.
        """

    def working(self, asked: Mapping[int, int]) -> AbstractContextManager[None]:
        """Show the progress of scoring; ``asked`` is the number of candidates of each prompt."""

    def say(self, i: int, best: SearchResult | Unsearched, text: str) -> None:
        """Print the initial prompt of prompt ``i``."""


@dataclass(frozen=True)
class Unsearched:
    """Initial tokens that were not compared with others.

    Attributes:
        what: description of the origin of the tokens.
        why: reason for no search, if a search was possible; empty otherwise.
    """

    words: Words
    what: str
    why: str


def search_starts(
    config: RunConfig,
    vocabulary: Vocabulary,
    screen: InitScorer,
    before: Mapping[str, Sequence[int]] | None = None,
) -> dict[int, Tensor]:
    """Return initial values for the prompts whose start is left open, by their indices.

    Embeddings of tokens give the same loss as the keys and values that the base computes from these
    tokens, so both are searched as embeddings. Prompts with the same task, place, length, seeds,
    teacher and budget share one search.

    Args:
        before: as in ``Bank``.
    """
    same: dict[object, list[int]] = {}
    for i in _open_prompts(config.prompts):
        same.setdefault(_what_is_open(config, config.prompts[i]), []).append(i)
    best: dict[int, SearchResult | Unsearched] = {}
    searches: dict[int, Search] = {}
    candidates: dict[int, int] = {}
    for i, *_ in same.values():
        start = _first_starts(config, i, vocabulary)
        if isinstance(start, Unsearched):
            best[i] = start
        else:
            candidates[i], searches[i] = start
    if searches:
        with screen.working(candidates):
            best |= search_together(searches, lambda tried: screen.losses(tried, vocabulary.embed))
    starts: dict[int, Tensor] = {}
    for several in same.values():
        of = best[several[0]]
        text = str(vocabulary.tokenizer.decode(list(of.words)))
        made = dict[tuple[bool, tuple[int, ...]], Tensor]()
        for i in several:
            screen.say(i, of, text)
            prompt = config.prompts[i]
            past, after = prompt.entry.trains_prefix, tuple((before or {}).get(prompt.name, ()))
            if (past, after) not in made:
                read = vocabulary.read(of.words, after) if past else vocabulary.embed(of.words)
                made[past, after] = read
            starts[i] = made[past, after].clone()
    return starts


def _open_prompts(prompts: Sequence[Prompt]) -> list[int]:
    """Return the prompts to search for; of a share only the first prompt, which initializes it."""
    shares: set[str] = set()
    indices = []
    for i, prompt in enumerate(prompts):
        begins = prompt.share is None or prompt.share not in shares
        if prompt.share is not None:
            shares.add(prompt.share)
        if begins and prompt.init.open and prompt.entry.searches_init:
            indices.append(i)
    return indices


def _what_is_open(config: RunConfig, prompt: Prompt) -> object:
    """Key of everything that a search depends on."""
    seeds = config.prompt_seed(prompt), config.data_seed(prompt)
    budget = config.init_budget(prompt)
    return (
        prompt.task,
        prompt.placement,  # the rows of the first update depend on it
        prompt.num_virtual_tokens,
        *seeds,
        prompt.teacher,
        budget,
        prompt.init.search,
    )


def _first_starts(
    config: RunConfig, i: int, vocabulary: Vocabulary
) -> Unsearched | tuple[int, Search]:
    """Return (number of candidates, search), or the initial tokens if the budget is too small."""
    prompt = config.prompts[i]
    generator = torch.Generator().manual_seed(config.prompt_seed(prompt))
    task, length = config.task(prompt.task), prompt.num_virtual_tokens
    labels = label_texts(task)
    quiet = replace(vocabulary, warn=lambda _: None)

    def ids(init: Init) -> Words:
        token_ids = initial_token_ids(init, quiet, length, generator, labels)
        assert token_ids is not None, init
        return tuple(token_ids)

    budget, steps = config.init_budget(prompt), config.prompt_steps(prompt)
    by_text = bool(texts := config.init_texts(prompt))
    starts = hand_written_starts(texts or task.hand_written)
    written = [(what, ids(init)) for what, init in starts]
    choices = [("the task's choices", ids(Init(labels=True)))] if labels and not by_text else []
    known, drawn = written + choices, Init(vocab=True)
    size = Extent(len(known), 0, 0) if by_text else extent(budget, len(known))
    if by_text and len(known) == 1:
        return Unsearched(known[0][1], known[0][0], "")
    if size is None or size.prompts > budget:
        what, words = known[0] if known else ("words drawn from the vocabulary", ids(drawn))
        least = FEWEST if size is None else size.prompts
        why = f"search.init_share allows {budget} of at least {least} candidates"
        why = f"no comparison of candidates, which {steps} steps are too few for: {why}"
        return Unsearched(words, what, why)
    begin_with = known[: size.known]
    begin_with += [(f"drawing {n + 1} of words", ids(drawn)) for n in range(size.drawings)]
    return size.prompts, search(begin_with, lambda: ids(drawn), generator, size.rounds)
