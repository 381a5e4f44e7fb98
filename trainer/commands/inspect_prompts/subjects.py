"""The prompts to inspect, each with its rows, its controls and its values at checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from trainer.checkpointing.checkpoint import SavedCheckpoint
from trainer.checkpointing.state_tensors import join_tensors
from trainer.commands.evaluate.rows import at_most
from trainer.config import Prompt, RunConfig
from trainer.data.task_data import EvalSet, TaskData
from trainer.evaluation.inspection.embedding_space import random_like
from trainer.evaluation.inspection.leave_one_out import without
from trainer.prompts.bank import Bank
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt
from trainer.runtime.errors import BadInput

RANDOM, INITIAL, OTHER_TASK = CONTROLS = ("random", "initial", "other_task")


@dataclass(frozen=True)
class ControlPrompt:
    """A prompt that did not learn the task; ``name`` is that of the other task's prompt."""

    values: SoftPrompt
    name: str | None = None
    fits: bool = True


@dataclass
class Subject:
    """One prompt to inspect.

    Attributes:
        rows: validation rows to score, tokenized for the prompt's position.
        controls: by their names in ``CONTROLS``; those that do not exist are missing.
        num_fixed: number of the first keys and values that are those of fixed text.
        checkpoints: step and values, the oldest first.
        notes: what cannot be measured, and why.
    """

    prompt: Prompt
    values: SoftPrompt
    rows: EvalSet
    num_fixed: int = 0
    controls: dict[str, ControlPrompt] = field(default_factory=dict)
    checkpoints: list[tuple[int, SoftPrompt]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_prefix(self) -> bool:
        return isinstance(self.values, PrefixKeyValues)

    def variants(self) -> Iterator[tuple[str, SoftPrompt]]:
        """Yield name and values of the prompt, of its controls, and at its checkpoints."""
        yield "", self.values
        for name, control in self.controls.items():
            yield name, control.values
        for step, values in self.checkpoints:
            yield f"step-{step}", values

    def shorter(self) -> list[SoftPrompt | None]:
        """Return the prompt without each of its virtual tokens; None if it has only one."""
        return [without(self.values, {i}) for i in range(self.values.num_virtual_tokens)]


def make_subject(
    prompt: Prompt,
    data: TaskData,
    trained: Mapping[str, SoftPrompt],
    initial: Mapping[str, SoftPrompt],
    config: RunConfig,
    num_rows: int,
    context_length: int,
    num_fixed: int = 0,
) -> Subject:
    """Collect what is compared with a prompt.

    Args:
        trained, initial: values of all finished prompts of the run, and before training, by name.
        config: of the run, with all its prompts.
        num_rows: maximum number of rows.
        num_fixed: as in ``Subject``.
    """
    values = trained[prompt.name]
    subject = Subject(prompt, values, rows_of(prompt, data, num_rows), num_fixed)
    seed = zlib.crc32(prompt.name.encode()) + config.training.seed
    generator = torch.Generator().manual_seed(seed)
    drawn = random_like(values.tensor, generator).to(values.tensor.device)
    subject.controls[RANDOM] = ControlPrompt(replace(values, tensor=drawn))
    start = initial.get(prompt.name)
    if start is not None and start.tensor.shape == values.tensor.shape:
        subject.controls[INITIAL] = ControlPrompt(start.to(values.tensor.device))
    else:
        subject.notes.append(
            "the initial prompt is not known: the run was started by a version that did not save it"
        )
    other = _other_task(prompt, trained, config)
    if other is None:
        subject.notes.append(
            "no control of another task: the run has no finished prompt of this kind for one"
        )
    else:
        longest = int(subject.rows.candidates.table.lengths.max())
        fits = longest + trained[other].num_virtual_tokens <= context_length
        subject.controls[OTHER_TASK] = ControlPrompt(trained[other], other, fits)
    if subject.is_prefix:
        subject.notes.append(
            "a prefix has keys and values, not virtual tokens: nearest tokens, norm percentile, "
            "drift, redundancy, similarity of prompts and elicitation have no meaning for it"
        )
    return subject


def rows_of(prompt: Prompt, data: TaskData, num_rows: int) -> EvalSet:
    """Return rows at the prompt's position, scored by loss and, with choices, by accuracy.

    Nothing is generated, so no generated code runs.
    """
    rows = data.evaluation_at(prompt.placement)["validation"]
    rows = rows.subset(at_most(data.evaluation["validation"], num_rows))
    metric = "accuracy" if rows.task.scored_by_likelihood else "loss"
    return replace(rows, task=rows.task.model_copy(update={"metric": metric}))


def _other_task(prompt: Prompt, trained: Mapping[str, SoftPrompt], config: RunConfig) -> str | None:
    """Return a finished prompt of another task, of the same kind and most similar length."""
    kind = type(trained[prompt.name])
    others = [
        other.name
        for other in config.prompts
        if other.task != prompt.task and isinstance(trained.get(other.name), kind)
    ]
    length = trained[prompt.name].num_virtual_tokens
    return min(others, key=lambda n: abs(trained[n].num_virtual_tokens - length), default=None)


def values_at(
    bank: Bank, saved: Sequence[SavedCheckpoint]
) -> Iterator[tuple[int, dict[str, SoftPrompt]]]:
    """Yield the step and all prompts' values as validated, of every checkpoint.

    Raises:
        BadInput: a checkpoint is of another run, or damaged.
    """
    for one in saved:
        try:
            bank.load_state_dict(join_tensors(one.tensors, one.state["bank"]["prompts"]))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BadInput(f"{one.path}: {type(error).__name__}: {error}") from None
        yield one.step, dict(zip(bank.names, bank.judged(), strict=True))
