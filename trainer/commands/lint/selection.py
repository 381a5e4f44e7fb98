"""The instructions to check, and whether their rewrites can be measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.commands.lint.options import Options
from trainer.config import RunConfig
from trainer.evaluation.lint.finding import Finding
from trainer.evaluation.lint.instructions import Instruction, instruction_for, instructions_of
from trainer.evaluation.lint.rules import lint
from trainer.evaluation.metric_sums import metric_problem, package_problem
from trainer.runtime.errors import BadInput, did_you_mean


@dataclass(frozen=True)
class Checked:
    """An instruction with its findings."""

    instruction: Instruction
    findings: list[Finding]


def check(instruction: Instruction) -> Checked:
    """Apply all rules to an instruction."""
    return Checked(instruction, lint(instruction.text, instruction.words))


def checked_instructions(config: RunConfig, options: Options) -> list[Checked]:
    """Return the instructions of a run file, or the text for one of its tasks, with findings.

    Raises:
        BadInput: the task is unknown, or no instruction is given.
    """
    names = [task.name for task in config.tasks]
    if options.task is not None and options.task not in names:
        raise BadInput(
            f"--task: {options.run_file} has no task {options.task!r}"
            f"{did_you_mean(options.task, names)}; known: {', '.join(names)}"
        )
    if options.text is not None:
        task = config.task(options.task or names[0])
        return [check(instruction_for(config, task, options.text))]
    instructions = instructions_of(config, options.task)
    if not instructions:
        raise BadInput(
            f"{options.run_file}: has no instruction in words; add one to tasks.hand_written, or "
            "pass --text TEXT"
        )
    return [check(each) for each in instructions]


def to_measure(checked: Sequence[Checked]) -> list[Checked]:
    """Select the instructions with a rewrite that is ready to use."""
    return [each for each in checked if any(finding.measurable for finding in each.findings)]


def nothing_to_measure(checked: Sequence[Checked]) -> str:
    """Describe what is missing where no finding has a rewrite that is ready to use."""
    findings = [finding for each in checked for finding in each.findings]
    if not findings:
        texts = "the text" if len(checked) == 1 else f"the {len(checked)} texts"
        return f"--measure: nothing to measure: no rule found anything in {texts}"
    rules = ", ".join(dict.fromkeys(finding.rule for finding in findings))
    return (
        f"--measure: nothing to measure: no rewrite ({rules}) is ready to use; change the text by "
        "hand, and measure it against others with promptshard evaluate (tasks.hand_written)"
    )


def check_measurable(config: RunConfig, checked: Sequence[Checked], options: Options) -> None:
    """Raise ``BadInput`` with everything that prevents measuring, before the base is loaded.

    Tasks without a rewrite to measure are checked only if no task has one.
    """
    problems = []
    for name in dict.fromkeys(each.instruction.task for each in to_measure(checked) or checked):
        task = config.task(str(name))
        if task.tokens is not None:
            problems.append(
                f"--measure: task {name} has token ids; a text cannot stand before them"
            )
        if not task.has_validation:
            problems.append(
                f"tasks.{name}: has no validation rows to measure on; add tasks.{name}.validation "
                "or validation_share"
            )
        metric = options.metric or task.metric
        if reason := metric_problem(metric, task):
            problems.append(f"--metric: {reason} (task {name})")
    if missing := package_problem(options.metric or ""):
        problems.append(f"--metric: {missing}")
    if problems:
        raise BadInput(problems)
