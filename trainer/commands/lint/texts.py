"""Texts of instructions -> arms, all on the same rows of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.commands.evaluate.arm import Arm
from trainer.commands.evaluate.rows import RowEncoder, at_most
from trainer.data.task_data import EvalSet
from trainer.evaluation.lint.instructions import Instruction
from trainer.evaluation.metric_sums import scored_as


def arm_of(
    instruction: Instruction, text: str, plain: EvalSet, encoder: RowEncoder, metric: str
) -> Arm:
    """Return the rows of a task after a text: before the input, or as the text of the system.

    Args:
        plain: the rows, without any instruction except the system's.
    """
    numbers = plain.row_numbers
    task = plain.task
    if task.too_long == "skip":  # all texts need the same rows
        task = task.model_copy(update={"too_long": "truncate"})
    is_system = instruction.is_system
    if is_system:
        task = task.model_copy(update={"system": text})
    rows = encoder.encode(
        plain,
        plain.rows.take(np.asarray(numbers), "evaluated"),
        task=task,
        prefix="" if is_system else text,
    )
    scored = task.model_copy(update={"metric": scored_as(metric, task)})
    name = arm_name(instruction, text)
    rows = replace(rows, task=scored)
    return Arm(task.name, name, "hand_written", rows, text=text, numbers=numbers)


def arm_name(instruction: Instruction, text: str) -> str:
    """Name of an arm and its files, the same for the same text at each call."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{'system' if instruction.is_system else 'text'}-{digest}"


def selected(rows: EvalSet, count: int | None) -> EvalSet:
    """Select at most ``count`` rows."""
    return rows.subset(at_most(rows, count))


def distinct(arms: Sequence[Arm]) -> list[Arm]:
    """Return one arm of every name."""
    return list({arm.name: arm for arm in arms}.values())
