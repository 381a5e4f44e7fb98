"""What a run reads and computes: from its run file, its rows and the headers of its base."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from trainer.config import RunConfig
from trainer.cost_model.base_shape import BaseShape
from trainer.data.splits import load_splits
from trainer.data.task_data import TaskData
from trainer.data.teacher import Teacher
from trainer.data.token_table import Example
from trainer.model.families import layer_sizes
from trainer.packing.activation_memory import LayerSizes
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_row import PackedRow, PromptLengths

#: Rows of each task whose lengths are used to estimate the memory of packed batches.
SAMPLE = 1000
#: Updates whose packed batches are counted.
STEPS = 3
#: Share of the tokens of a row of unknown content that are labels.
LABEL_SHARE = 1 / 8
#: Length of the text of a teacher, if no tokenizer is read.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Generation:
    """Texts that a validation generates: number of rows, tokens of a row, new tokens of a row."""

    rows: int = 0
    row_tokens: float = 0.0
    new_tokens: int = 0


@dataclass(frozen=True)
class RunNeeds:
    """What a run computes, independent of devices.

    Attributes:
        steps_rows: rows of some updates, as the run samples them.
        prompt_lengths: of ``steps_rows``.
        lengths: tokens of training rows, or of a sample.
        validation_tokens: read by one validation of each prompt, [K].
        baseline_tokens: read to score the baselines.
        generations: of one validation of each prompt, [K].
        stored_bytes: of the weight files.
        packed: the family supports packed rows.
    """

    config: RunConfig
    base: BaseShape
    sizes: LayerSizes
    steps_rows: Sequence[Sequence[PackedRow]]
    prompt_lengths: PromptLengths
    lengths: Sequence[int]
    validation_tokens: Sequence[int]
    baseline_tokens: int
    generations: Sequence[Generation]
    stored_bytes: int
    packed: bool = True


def needs_of_tasks(
    config: RunConfig,
    tasks: Mapping[str, TaskData],
    base: BaseShape,
    text: PretrainedConfig,
    stored_bytes: int,
) -> RunNeeds:
    """Count the work of a run from its tokenized rows.

    Args:
        text: config of the text model.
    """
    source = BatchSource(config, tasks)
    active = [True] * len(config.prompts)
    evaluation = [tasks[p.task].evaluation_at(p.placement) for p in config.prompts]
    baselines = sum(
        (1 + len(data.task.hand_written))
        * sum(rows.num_tokens for rows in data.evaluation.values())
        for data in tasks.values()
    )
    generations = []
    for prompt, splits in zip(config.prompts, evaluation, strict=True):
        task = config.task(prompt.task)
        count = sum(len(rows.candidates) for rows in splits.values())
        tokens = sum(rows.num_tokens for rows in splits.values())
        generates = task.metric not in ("accuracy", "loss") and count
        generations.append(
            Generation(count, tokens / count, task.max_new_tokens) if generates else Generation()
        )
    return RunNeeds(
        config,
        base,
        layer_sizes(text),
        [source.next_step(active) for _ in range(STEPS)],
        lengths_of_prompts(config),
        [n for data in tasks.values() for n in data.train.lengths[:SAMPLE].tolist()],
        [sum(rows.num_tokens for rows in splits.values()) for splits in evaluation],
        baselines,
        generations,
        stored_bytes,
    )


def needs_of_row_tokens(
    config: RunConfig,
    row_tokens: int,
    base: BaseShape,
    text: PretrainedConfig,
    stored_bytes: int,
) -> RunNeeds:
    """Count the work of a run whose rows all have ``row_tokens`` tokens; reads no tokenizer."""
    count = max(1, config.training.tokens_per_step // row_tokens)
    labels = max(1, int(LABEL_SHARE * row_tokens))
    draw = random.Random(0)
    rows: list[PackedRow] = []
    for k, prompt in enumerate(config.prompts):
        written = (0,) * (len(prompt.teacher or "") // CHARACTERS_PER_TOKEN + 1)
        teacher = None if prompt.teacher is None else Teacher(k, written, 0)
        for _ in range(count):
            ids = tuple(draw.randrange(base.vocab_size) for _ in range(row_tokens))
            example = Example.with_target(ids, row_tokens - labels, len(rows))
            rows.append(PackedRow(example, k, len(rows), teacher=teacher))
    evaluated = {
        task.name: sum(len(read) for split, read in load_splits(task).items() if split != "train")
        for task in config.tasks
    }
    generations = []
    for prompt in config.prompts:
        task, number = config.task(prompt.task), evaluated[prompt.task]
        generates = task.metric not in ("accuracy", "loss") and number
        generations.append(
            Generation(number, row_tokens, task.max_new_tokens) if generates else Generation()
        )
    return RunNeeds(
        config,
        base,
        layer_sizes(text),
        [rows],
        lengths_of_prompts(config),
        [row_tokens] * count,
        [evaluated[prompt.task] * row_tokens for prompt in config.prompts],
        sum((1 + len(t.hand_written)) * evaluated[t.name] * row_tokens for t in config.tasks),
        generations,
        stored_bytes,
    )


def lengths_of_prompts(config: RunConfig) -> PromptLengths:
    """Positions in packed batches, and keys and values, of every prompt of a run file."""
    lengths: Sequence[tuple[int, int]] = [
        (0, p.num_virtual_tokens) if p.entry.trains_prefix else (p.num_virtual_tokens, 0)
        for p in config.prompts
    ]
    return PromptLengths(tuple(n for n, _ in lengths), tuple(n for _, n in lengths))
