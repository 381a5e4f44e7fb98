"""Encoders as the run file asks for them, and which of them train together.

Shape letters: H hidden size of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer.config import SHARED, Prompt, RunConfig
from trainer.prompts.encoders import PromptEncoder, make_encoder
from trainer.prompts.initializers import (
    Vocabulary,
    candidates,
    initialize,
    keys_and_values,
    words,
)
from trainer.prompts.multitask import (
    LowRankEncoder,
    SharedPrompt,
    TextEncoder,
    TextReader,
    make_part,
)
from trainer.tasks.checks import label_texts

#: Starts and what they are -> the one to take.
Choose = Callable[[Sequence[tuple[str, Tensor]]], Tensor]


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
    choose: Choose | None = None,
) -> PromptEncoder:
    """A prompt's encoder on the CPU: a function of its own settings, task and seed alone.

    Args:
        parts: what the encoders of each share have in common, from the first of them on.
        choose: of several starts, the one to take; None: the last, as good as any for a prompt
            whose state will be loaded.
    """
    generator = torch.Generator().manual_seed(config.prompt_seed(prompt))

    def start() -> Tensor:
        of = keys_and_values if prompt.method == "prefix_tuning" else initialize
        task = config.task(prompt.task)
        labels = label_texts(task)
        inits = candidates(prompt.init, labels, task.hand_written)
        if choose is None or len(inits) == 1:
            inits = inits[-1:]
        # Of starts that are only tried nobody needs to hear how they were cut.
        table = vocabulary if len(inits) == 1 else replace(vocabulary, warn=lambda _: None)
        starts = [
            (what, of(init, table, prompt.num_virtual_tokens, generator, labels))
            for what, init in inits
        ]
        return choose(starts) if choose is not None and len(starts) > 1 else starts[0][1]

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
