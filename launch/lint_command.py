"""The command ``promptshard lint``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch import completion, preflight, settings_text
from launch.arguments import Overrides, as_path, option
from launch.start import count
from trainer.config import load
from trainer.evaluation.lint.instructions import Instruction, instructions_of, words_of
from trainer.evaluation.lint.rules import Finding, TaskWords
from trainer.evaluation.lint.rules import lint as findings_of
from trainer.runtime.errors import BadInput
from trainer.runtime.redact import printable

#: Characters of the text that are shown on each side of a finding.
_AROUND = 30


def lint(
    run_file: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN.yaml",
            callback=lambda value: value and as_path(value),
            help="A run file: its hand-written prompts, system texts and initial texts are read.",
            show_default=False,
            autocompletion=completion.run_files,
        ),
    ] = None,
    overrides: Overrides = None,
    text: Annotated[
        str | None,
        option(
            "TEXT",
            "Read this text instead. With RUN.yaml: as an instruction for its task (or --task).",
        ),
    ] = None,
    task: Annotated[
        str | None, option("NAME", "With RUN.yaml: only the instructions of this task.")
    ] = None,
    json_file: Annotated[
        str | None,
        option("FILE", "Output file for all findings; -: stdout.", "--json", callback=as_path),
    ] = None,
) -> None:
    """Check instructions in words: what makes them hard to follow, and a rewrite for each finding.

    The rules: sentences that are too long, several requests in one, filler, vague amounts, double
    negation, "don't" without what to do instead, naming the thing to avoid, a constraint in the
    middle, contradictions, undefined terms, no output format, class names that are missing or
    spelled in another way, more tokens than the prompt holds.

    **Examples:**

    - `promptshard lint run.yaml`
    - `promptshard lint --text "Please classify the review, and don't mention prices."`
    - `promptshard lint run.yaml --text "Is the patient satisfied?"`
    """
    instructions = _instructions(run_file, overrides or [], text, task)
    results = [(each, findings_of(each.text, each.words)) for each in instructions]
    if json_file:
        _write(json_file, results)
    if json_file != "-":
        for line in _lines(results, settings_text.output_width()):
            typer.echo(line)


def _instructions(
    run_file: str | None, overrides: Sequence[str], text: str | None, task: str | None
) -> list[Instruction]:
    if run_file is None:
        if text is None:
            raise BadInput("lint: nothing to read; name a RUN.yaml or pass --text TEXT")
        if task is not None:
            raise BadInput("--task: names a task of a run file; name the RUN.yaml, too")
        return [Instruction("--text", _checked(text), None, TaskWords())]
    config = load(run_file, overrides)
    names = [each.name for each in config.tasks]
    if task is not None and task not in names:
        raise BadInput(f"--task: {run_file} has no task {task!r}; known: {', '.join(names)}")
    if text is not None:
        chosen = config.task(task or names[0])
        return [Instruction("--text", _checked(text), chosen.name, words_of(config, chosen))]
    selected = [each for each in instructions_of(config) if task in (None, each.task)]
    if not selected:
        raise BadInput(
            f"{run_file}: has no instruction in words; add one to tasks.hand_written, or pass "
            "--text TEXT"
        )
    return selected


def _checked(text: str) -> str:
    if not text.strip():
        raise BadInput("--text: is empty; pass an instruction in words")
    return text


def _write(json_file: str, results: Sequence[tuple[Instruction, list[Finding]]]) -> None:
    prompts = [
        {
            "place": each.place,
            "task": each.task,
            "text": each.text,
            "findings": [asdict(finding) | {"effect": None} for finding in findings],
        }
        for each, findings in results
    ]
    text = json.dumps({"prompts": prompts}, indent=2, ensure_ascii=False) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
    else:
        path = preflight.check_new_file(Path(json_file))
        path.write_text(text, encoding="utf-8")


def _lines(results: Sequence[tuple[Instruction, list[Finding]]], width: int) -> Iterator[str]:
    for each, findings in results:
        name = each.place if each.task is None else f"{each.place} ({each.task})"
        yield from settings_text.wrap(f"{name}: {printable(each.text.strip())!r}", width)
        for finding in findings:
            yield typer.style(f"  {finding.rule}", bold=True) + f"  {_shown(each.text, finding)}"
            yield from settings_text.wrap(f"{printable(finding.why)} {_advice(finding)}", width, 4)
        yield from ["  no findings"] * (not findings)
        yield ""
    total = sum(len(findings) for _, findings in results)
    yield f"{count(total, 'finding')} in {count(len(results), 'text')}"


def _advice(finding: Finding) -> str:
    rewrite = printable(finding.rewrite.strip())
    if len(rewrite) < 2:
        return "Leave it out."
    return f"{'Add' if finding.start == finding.end else 'Rewrite'}: {rewrite!r}"


def _shown(text: str, finding: Finding) -> str:
    """Return the part of a finding with some text around it, underlined on a terminal."""
    before, part, after = (
        printable(piece.replace("\n", " "))
        for piece in (text[: finding.start], text[finding.start : finding.end], text[finding.end :])
    )
    before = f"...{before[-_AROUND:]}" if len(before) > _AROUND else before
    after = f"{after[:_AROUND]}..." if len(after) > _AROUND else after
    if len(part) > 2 * _AROUND:
        before, part, after = "", f"{part[:_AROUND].strip()}...{part[-_AROUND:].strip()}", ""
    return before.lstrip() + typer.style(part, underline=True) + after.rstrip()
