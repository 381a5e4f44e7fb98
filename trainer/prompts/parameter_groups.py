"""Encoders as the run file asks for them, and which of them train together.

Shape letters: H hidden size of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.config import Init, Prompt, RunConfig
from trainer.data.row_validation import label_texts
from trainer.prompts.encoders import EncoderInputs, PromptEncoder
from trainer.prompts.init_search import Search, SearchResult, Words, extent, search, search_together
from trainer.prompts.initializers import (
    Vocabulary,
    initialize,
    keys_and_values,
    known_starts,
    word_ids,
)


@dataclass(frozen=True)
class ParameterGroup:
    """Prompts that train one set of parameters: one prompt, or all of a share.

    Attributes:
        members: their indices.
        parameters: by the name that an encoder has for them; what is the own of another member
            than the first is named ``MEMBER/NAME``.
    """

    members: list[int]
    parameters: dict[str, nn.Parameter]

    def of_encoder(self, encoder: PromptEncoder, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of values by the names of ``parameters`` those of one encoder, by its own names."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {own: values[names[id(p)]] for own, p in encoder.named_parameters()}


def units_of(prompts: Sequence[Prompt], encoders: Sequence[PromptEncoder]) -> list[ParameterGroup]:
    """Every prompt in one unit, in the order of their first members."""
    units: list[ParameterGroup] = []
    shares: dict[str, ParameterGroup] = {}
    for i, (prompt, encoder) in enumerate(zip(prompts, encoders, strict=True)):
        parameters = dict(encoder.named_parameters())
        unit = shares.get(prompt.share) if prompt.share is not None else None
        if unit is None:
            units.append(ParameterGroup([i], parameters))
            if prompt.share is not None:
                shares[prompt.share] = units[-1]
            continue
        unit.members.append(i)
        known = {id(parameter) for parameter in unit.parameters.values()}
        for name, parameter in parameters.items():
            if id(parameter) not in known:
                unit.parameters[f"{prompt.name}/{name}"] = parameter
    return units


class InitScorer(Protocol):
    """What a search asks of a scorer: see ``trainer.training.init_scoring``."""

    def losses(
        self, starts: Sequence[tuple[int, Words]], embed: Callable[[Sequence[int]], Tensor]
    ) -> list[float]:
        """Mean loss of each start, words, as that of the prompt beside it.

        Args:
            embed: word embeddings [n, H] of token ids; may be a collective.
        """

    def working(self, asked: Mapping[int, int]) -> AbstractContextManager[None]:
        """Show how far it is, where this takes long.

        Args:
            asked: prompts, and how many starts of each will be judged.
        """

    def say(self, i: int, best: SearchResult | Unsearched, text: str) -> None:
        """Print the initial prompt of prompt ``i``."""


@dataclass(frozen=True)
class Unsearched:
    """The initial prompt of a run that is too short for a search.

    Attributes:
        what: where the words come from.
        budget: candidates that the search could have scored.
    """

    words: Words
    what: str
    budget: int


def search_starts(
    config: RunConfig, vocabulary: Vocabulary, screen: InitScorer
) -> dict[int, Tensor]:
    """Initial values of the prompts with ``init: auto``, by the prompts' indices: words that fit.

    Virtual tokens that are embeddings, and keys and values that the base computes from the same
    words, give the same loss: both are searched as embeddings. Prompts with the same task, seed,
    row order and budget share one search.
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
        text, made = str(vocabulary.tokenizer.decode(list(of.words))), dict[bool, Tensor]()
        for i in several:
            screen.say(i, of, text)
            past = config.prompts[i].method == "prefix_tuning"
            if past not in made:
                made[past] = (vocabulary.read if past else vocabulary.embed)(of.words)
            starts[i] = made[past].clone()
    return starts


def _open_prompts(prompts: Sequence[Prompt]) -> list[int]:
    """Those with ``init: auto``; of a share the first, which starts what is in common.

    Where an encoder makes something else of what it is given, any drawn words will do.
    """
    shares: set[str] = set()
    indices = []
    for i, prompt in enumerate(prompts):
        begins = prompt.share is None or prompt.share not in shares
        if prompt.share is not None:
            shares.add(prompt.share)
        if begins and prompt.init.auto and prompt.entry.searches_init:
            indices.append(i)
    return indices


def _what_is_open(config: RunConfig, prompt: Prompt) -> object:
    """All that a search depends on."""
    seeds = config.prompt_seed(prompt), config.data_seed(prompt)
    budget = config.init_budget(prompt)
    return prompt.task, prompt.num_virtual_tokens, *seeds, prompt.teacher, budget


def _first_starts(
    config: RunConfig, i: int, vocabulary: Vocabulary
) -> Unsearched | tuple[int, Search]:
    """The search of a prompt and how many candidates it scores; its start if there is none."""
    prompt = config.prompts[i]
    generator = torch.Generator().manual_seed(config.prompt_seed(prompt))
    task, length = config.task(prompt.task), prompt.num_virtual_tokens
    labels = label_texts(task)
    # Of what is only tried nobody needs to hear how it was cut.
    quiet = replace(vocabulary, warn=lambda _: None)

    def ids(init: Init) -> Words:
        token_ids = word_ids(init, quiet, length, generator, labels)
        assert token_ids is not None, init
        return tuple(token_ids)

    known, drawn = known_starts(labels, task.hand_written), Init(vocab=True)
    budget = config.init_budget(prompt)
    size = extent(budget, len(known))
    if size is None:
        what, init = known[0] if known else ("words drawn from the vocabulary", drawn)
        return Unsearched(ids(init), what, budget)
    begin_with = [(what, ids(init)) for what, init in known[: size.known]]
    begin_with += [(f"drawing {n + 1} of words", ids(drawn)) for n in range(size.drawings)]
    return size.prompts, search(begin_with, lambda: ids(drawn), generator, size.rounds)


def build_encoder(
    config: RunConfig,
    prompt: Prompt,
    vocabulary: Vocabulary,
    hidden_size: int,
    shared_modules: dict[str, nn.Module],
    init: Tensor | None = None,
) -> PromptEncoder:
    """Build a prompt's encoder on the CPU, from its own settings, task and seed alone.

    Args:
        shared_modules: modules that prompts have in common, by ``share``; extended here.
        init: the result of an initialization search. None: ``init: auto`` draws tokens, which is
            enough for a prompt whose state is loaded afterwards.
    """
    generator = torch.Generator().manual_seed(config.prompt_seed(prompt))

    def initial_values() -> Tensor:
        if init is not None:
            return init
        settings = Init(vocab=True) if prompt.init.auto else prompt.init
        initializer = keys_and_values if prompt.method == "prefix_tuning" else initialize
        labels = label_texts(config.task(prompt.task))
        return initializer(settings, vocabulary, prompt.num_virtual_tokens, generator, labels)

    build = prompt.entry.load_builder()
    encoder: PromptEncoder = build(
        EncoderInputs(prompt, hidden_size, generator, vocabulary, initial_values, shared_modules)
    )
    return encoder
