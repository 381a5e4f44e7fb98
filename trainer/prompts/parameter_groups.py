"""Build the encoders of a run, and group the parameters that one optimizer trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config import Init, Prompt, RunConfig
from trainer.data.row_validation import label_texts
from trainer.prompts.encoders import EncoderInputs, PromptEncoder
from trainer.prompts.initializers import Vocabulary, initialize, keys_and_values


@dataclass(frozen=True)
class ParameterGroup:
    """Prompts that train one set of parameters: a single prompt, or all prompts of a share.

    Attributes:
        members: indices of the prompts.
        parameters: by their names in the first member's encoder; parameters that only another
            member has are named ``MEMBER/NAME``.
    """

    members: list[int]
    parameters: dict[str, nn.Parameter]

    def of_encoder(self, encoder: PromptEncoder, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename ``values`` from the keys of ``parameters`` to the names in one encoder."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {own: values[names[id(p)]] for own, p in encoder.named_parameters()}


def group_parameters(
    prompts: Sequence[Prompt], encoders: Sequence[PromptEncoder]
) -> list[ParameterGroup]:
    """Group the prompts of each share; groups are in the order of their first members."""
    groups: list[ParameterGroup] = []
    shares: dict[str, ParameterGroup] = {}
    for i, (prompt, encoder) in enumerate(zip(prompts, encoders, strict=True)):
        parameters = dict(encoder.named_parameters())
        group = shares.get(prompt.share) if prompt.share is not None else None
        if group is None:
            groups.append(ParameterGroup([i], parameters))
            if prompt.share is not None:
                shares[prompt.share] = groups[-1]
            continue
        group.members.append(i)
        known = {id(parameter) for parameter in group.parameters.values()}
        for name, parameter in parameters.items():
            if id(parameter) not in known:
                group.parameters[f"{prompt.name}/{name}"] = parameter
    return groups


def build_encoder(
    config: RunConfig,
    prompt: Prompt,
    vocabulary: Vocabulary,
    hidden_size: int,
    shared_modules: dict[str, nn.Module],
    init: Tensor | None = None,
    after: Sequence[int] = (),
) -> PromptEncoder:
    """Build a prompt's encoder on the CPU, from its own settings, task and seed alone.

    Args:
        shared_modules: modules that prompts have in common, by ``share``; extended here.
        init: result of a search for initial values. None: ``init: auto`` draws tokens, as for a
            prompt whose state is loaded afterwards.
        after: tokens before the prompt, for keys and values.
    """
    generator = torch.Generator().manual_seed(config.prompt_seed(prompt))

    def initial_values() -> Tensor:
        if init is not None:
            return init
        settings = Init(vocab=True) if prompt.init.open else prompt.init
        labels = label_texts(config.task(prompt.task))
        given = settings, vocabulary, prompt.num_virtual_tokens, generator, labels
        return keys_and_values(*given, after) if prompt.entry.trains_prefix else initialize(*given)

    build = prompt.entry.load_builder()
    encoder: PromptEncoder = build(
        EncoderInputs(prompt, hidden_size, generator, vocabulary, initial_values, shared_modules)
    )
    return encoder
