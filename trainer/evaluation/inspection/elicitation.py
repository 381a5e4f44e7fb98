"""Elicit a description of a prompt's task: InSPEcT (Ramati et al. 2024, arXiv 2410.11660).

The base reads the prompt. The hidden states of its virtual tokens at one layer then replace those
of placeholders at the same or another layer, and the base continues the text. The placeholders
follow descriptions of other tasks, as in the paper, or nothing: a small base does not describe from
examples. Read the controls as well.

Layers are numbered by their input: 0 is the first layer's, the virtual tokens themselves.

Shape letters: L layers, P virtual tokens, T tokens of a packed batch, B rows, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.token_table import Example
from trainer.distributed.prefetch import prepare_batch
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import generate
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.model.attention.padded import pad_rows
from trainer.model.generation_config import end_ids
from trainer.model.prompted_model import HiddenStatesRequest, PromptedBase
from trainer.packing.packed_batch import PackedBatch
from trainer.packing.packed_row import PackedRow
from trainer.packing.planning import portions
from trainer.prompts.soft_prompt import VirtualTokens, prompt_lengths

#: Descriptions of other tasks, with their classes, in the manner of the paper.
DEMONSTRATIONS = (
    "Tell which feeling the text expresses: joy, sadness, anger or fear",
    "Sort the e-mail: spam or not spam",
    "Name the season that the text describes: spring, summer, autumn or winter",
)
SEPARATOR = " | "
PLACEHOLDER = " x"
#: Layers to read from and to write to, evenly spaced: all pairs are tried.
MOST_LAYERS = 4
MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Description:
    """What one pair of layers elicits.

    Attributes:
        layers: whose input is read, and whose input is replaced.
        with_examples: the placeholders follow descriptions of other tasks.
    """

    layers: tuple[int, int]
    with_examples: bool
    text: str


def class_rate(text: str, classes: Sequence[str]) -> float:
    """Return the share of class names that occur in a text as words, in any case."""
    words = _words(text)
    return sum(_words(name) in words for name in classes) / len(classes)


def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def layer_choice(num_layers: int) -> list[int]:
    """Return the layers to try: all, or ``MOST_LAYERS`` evenly spaced ones."""
    if num_layers <= MOST_LAYERS:
        return list(range(num_layers))
    return [round(i * (num_layers - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)]


def num_texts(num_prompts: int, num_layers: int) -> int:
    """Number of texts that ``elicit`` generates."""
    return 2 * num_prompts * len(layer_choice(num_layers)) ** 2


def elicit(
    evaluator: Evaluator,
    prompts: Sequence[VirtualTokens],
    examples: Sequence[Example],
    demonstrations: Sequence[str],
    context_length: int,
    advance: Callable[[float], None] = lambda texts: None,
) -> list[list[Description]]:
    """Describe each prompt with all pairs of layers, with and without examples; a collective.

    Args:
        examples: a row of each prompt's task, whose text before the virtual tokens is read too.
        demonstrations: descriptions of other tasks.
        context_length: texts that do not fit are left out.
        advance: called with the number of texts generated since the last call.

    Returns:
        For each prompt, one description per text; none if no text fits, or if the layers of the
        family read several hidden states of a token (Gemma 3n).
    """
    engine, base, tokenizer = evaluator.engine, evaluator.base, evaluator.tokenizer
    layers = decoder_layers(base)
    chosen = layer_choice(len(layers))
    states = _read_states(evaluator, prompts, examples, [layers[i] for i in chosen])
    examples_text = "".join(text + SEPARATOR for text in demonstrations)
    begin = {True: list(tokenizer(examples_text.rstrip())["input_ids"])}
    begin[False] = list(tokenizer("")["input_ids"])
    placeholder = tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"][-1]
    patches = [
        _Patch(k, source, target, with_examples, of_prompt[i])
        for with_examples in begin
        for k, of_prompt in enumerate(states)
        for i, source in enumerate(chosen)
        for target in chosen
        if len(begin[with_examples]) + len(of_prompt[i]) + MAX_NEW_TOKENS <= context_length
    ]
    described: list[list[Description]] = [[] for _ in prompts]
    if not patches:
        return described
    ids = {*end_ids(base.model.generation_config), tokenizer.eos_token_id} - {None}
    stop = StopCriteria(tokenizer, frozenset(ids), (SEPARATOR.strip(),))
    done = 0

    def between_batches(count: int) -> None:
        nonlocal done
        advance(min(count, len(patches) - done))
        done = min(len(patches), done + count)
        evaluator.check_stop()

    generated = generate(
        engine,
        base,
        stop,
        [begin[p.with_examples] + [placeholder] * len(p.states_PH) for p in patches],
        None,
        MAX_NEW_TOKENS,
        between_batches=between_batches,
        max_tokens=evaluator.budget.generation_tokens(),
        around=lambda rows: _patched(layers, [patches[i] for i in rows]),
    )
    advance(len(patches) - done)
    engine.end_step()
    for patch, new in zip(patches, generated, strict=True):
        text = stop.text(new.ids, skip_special_tokens=True).strip()
        layers_used = patch.source, patch.target
        described[patch.prompt].append(Description(layers_used, patch.with_examples, text))
    return described


@dataclass(frozen=True)
class _Patch:
    """A text to generate: a prompt's states at a layer, and the layer whose input they replace."""

    prompt: int
    source: int
    target: int
    with_examples: bool
    states_PH: Tensor


def decoder_layers(base: PromptedBase) -> list[nn.Module]:
    """Return the base's layers in order."""
    count = base.model.config.num_hidden_layers
    modules = base.model.base_model.modules()
    lists = (module for module in modules if isinstance(module, nn.ModuleList))
    return list(next(module for module in lists if len(module) == count))


def _read_states(
    evaluator: Evaluator,
    prompts: Sequence[VirtualTokens],
    examples: Sequence[Example],
    layers: Sequence[nn.Module],
) -> list[list[Tensor]]:
    """Return the states of every prompt's virtual tokens before each layer, [P, H] each.

    Empty if the layers read several hidden states of a token.
    """
    lengths = prompt_lengths(prompts)
    states: list[list[Tensor]] = [[] for _ in prompts]
    # The shortest text: only its part before the virtual tokens matters.
    rows = [PackedRow(_shortened(example), k, k) for k, example in enumerate(examples)]
    size = [row.num_tokens + row.num_leading + lengths.tokens[k] for k, row in enumerate(rows)]
    for part in portions(range(len(rows)), lambda k: size[k], evaluator.budget.tokens):
        batch = prepare_batch([rows[k] for k in part], lengths, evaluator.engine.device)
        batch = batch.to(evaluator.engine.device)
        with torch.no_grad(), _recorded(layers) as inputs:
            evaluator.base(HiddenStatesRequest(batch), prompts)
        if any(hidden.dim() != 3 for hidden in inputs):
            return []
        for hidden in inputs:
            hidden_TH = _packed(hidden, batch, evaluator.base)
            for k, positions in batch.prompts:
                states[k].append(hidden_TH[positions.start : positions.end].clone())
    return states


def _shortened(example: Example) -> Example:
    """Cut a row after its prompt's segment: later tokens do not change the states."""
    start = max(example.prompt_end, example.prompt_at) + 1
    stop = min(start + 1, example.num_tokens)
    return Example(
        example.input_ids[:stop], ((stop - 1, stop),), 0, example.prompt_at, example.prompt_end
    )


def _packed(hidden: Tensor, batch: PackedBatch, base: PromptedBase) -> Tensor:
    """Return the hidden states [T, H] of a packed batch, which may have been padded."""
    if base.packed:
        return hidden[0]
    rows = pad_rows(batch.segments[batch.first_row :], hidden.device)
    return hidden.flatten(0, 1)[rows.place_T]


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the context, keep the hidden states that each of the layers reads."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        inputs.append(_hidden(arguments, named).detach())

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _patched(layers: Sequence[nn.Module], patches: Sequence[_Patch]) -> Iterator[None]:
    """Within the context, replace the last P hidden states of every row in the first forward."""
    remaining = {patch.target for patch in patches}

    def hook_of(target: int) -> Callable[..., Any]:
        def replace_states(_: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
            if target not in remaining:
                return None  # a later step, which reads a generated token
            remaining.remove(target)
            hidden_BTH = _hidden(arguments, named).clone()
            for row, patch in enumerate(patches):
                if patch.target == target:
                    hidden_BTH[row, -len(patch.states_PH) :] = patch.states_PH
            if arguments:
                return (hidden_BTH, *arguments[1:]), named
            return arguments, named | {"hidden_states": hidden_BTH}

        return replace_states

    hooks = [
        layers[i].register_forward_pre_hook(hook_of(i), with_kwargs=True) for i in sorted(remaining)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(arguments: Any, named: dict[str, Any]) -> Tensor:
    hidden: Tensor = arguments[0] if arguments else named["hidden_states"]
    return hidden
