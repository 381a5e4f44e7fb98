"""Encoders as the run file asks for them, and which of them train together.

Shape letters: H hidden size of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config import SHARED, Prompt, RunConfig
from trainer.prompts.encoders import PromptEncoder, make_encoder
from trainer.prompts.initializers import Vocabulary, initialize, keys_and_values, words
from trainer.prompts.multitask import (
    LowRankEncoder,
    SharedPrompt,
    TextEncoder,
    TextReader,
    make_part,
)
from trainer.tasks.checks import label_texts


@dataclass(frozen=True)
class Unit:
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


def units_of(prompts: Sequence[Prompt], encoders: Sequence[PromptEncoder]) -> list[Unit]:
    """Every prompt in one unit, in the order of their first members."""
    units: list[Unit] = []
    shares: dict[str, Unit] = {}
    for i, (prompt, encoder) in enumerate(zip(prompts, encoders, strict=True)):
        parameters = dict(encoder.named_parameters())
        unit = shares.get(prompt.share) if prompt.share is not None else None
        if unit is None:
            units.append(Unit([i], parameters))
            if prompt.share is not None:
                shares[prompt.share] = units[-1]
            continue
        unit.members.append(i)
        known = {id(parameter) for parameter in unit.parameters.values()}
        for name, parameter in parameters.items():
            if id(parameter) not in known:
                unit.parameters[f"{prompt.name}/{name}"] = parameter
    return units


def build_encoder(
    config: RunConfig,
    prompt: Prompt,
    vocabulary: Vocabulary,
    hidden_size: int,
    parts: dict[str, nn.Module],
) -> PromptEncoder:
    """A prompt's encoder on the CPU: a function of its own settings, task and seed alone.

    Args:
        parts: what the encoders of each share have in common, from the first of them on.
    """
    generator = torch.Generator().manual_seed(config.prompt_seed(prompt))

    def start() -> Tensor:
        of = keys_and_values if prompt.method == "prefix_tuning" else initialize
        labels = label_texts(config.task(prompt.task))
        return of(prompt.init, vocabulary, prompt.num_virtual_tokens, generator, labels)

    if prompt.encoder_name not in SHARED:
        return make_encoder(prompt, start(), generator, hidden_size)
    part = None if prompt.share is None else parts.get(prompt.share)
    if part is None:
        part = make_part(prompt, start, generator, hidden_size)
        if prompt.share is not None:
            parts[prompt.share] = part
    if isinstance(part, TextReader):
        assert prompt.init.text is not None
        return TextEncoder(part, words(prompt.init.text, vocabulary))
    assert isinstance(part, SharedPrompt), part
    generator.manual_seed(config.prompt_seed(prompt))
    return LowRankEncoder(part, prompt.rank, generator)
