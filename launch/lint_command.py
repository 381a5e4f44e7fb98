"""The command ``promptshard lint``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launch import completion, lint_text, messages, preflight, settings_text
from launch.arguments import Overrides, Processes, as_path, option
from launch.start import start_ranks
from trainer.commands.lint.options import RESULTS, Options, results_folder
from trainer.commands.lint.selection import (
    Checked,
    check,
    check_measurable,
    checked_instructions,
    nothing_to_measure,
    to_measure,
)
from trainer.config import load
from trainer.evaluation.lint.finding import TaskWords
from trainer.evaluation.lint.instructions import Instruction
from trainer.evaluation.lint.results import CheckedText, LintResults, unmeasured
from trainer.evaluation.metric_sums import METRICS
from trainer.runtime.errors import BadInput, did_you_mean
from trainer.runtime.json_file import read_json_object, to_json


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
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="With RUN.yaml: also score each rewrite on the task's validation rows, beside the "
            "original. Loads the base.",
        ),
    ] = False,
    rows: Annotated[
        int | None,
        option("N", "With --measure: at most N rows per task, selected by their content.", min=2),
    ] = None,
    metric: Annotated[
        str | None,
        option("NAME", f"With --measure: one of {', '.join(METRICS)}. [default: the task's]"),
    ] = None,
    json_file: Annotated[
        str | None,
        option("FILE", "Output file for all findings; -: stdout.", "--json", callback=as_path),
    ] = None,
    processes: Processes = None,
) -> None:
    """Check instructions in words: what makes them hard to follow, and a rewrite for each finding.

    The rules: sentences that are too long, several requests in one, filler, vague amounts, double
    negation, "don't" without what to do instead, naming the thing to avoid, a constraint in the
    middle, contradictions, undefined terms, no output format, class names that are missing or
    spelled in another way, more tokens than the prompt holds.

    A rule may not matter to your base model. `--measure` shows whether it does: it scores the
    instruction, each rewrite, all rewrites of a rule and all rewrites together on the same rows,
    in one pass. Predictions are written to `OUTPUT_DIR/lint` while rows are scored; an interrupted
    command continues there.

    **Examples:**

    - `promptshard lint run.yaml`
    - `promptshard lint --text "Please classify the review, and don't mention prices."`
    - `promptshard lint run.yaml --text "Is the patient satisfied?"`
    - `promptshard lint run.yaml --measure --rows 200`
    """
    if json_file not in (None, "-"):
        json_file = str(preflight.check_new_file(Path(json_file or "")))
    _check(run_file, text, task, rows, metric, measure=measure)
    if run_file is None:
        checked = [check(Instruction("--text", text or "", None, TaskWords()))]
        results = _unmeasured(checked)
    else:
        options = Options(run_file, tuple(overrides or ()), text, task, rows, metric)
        results = _measured(options, processes) if measure else _of_run(options)
    if json_file == "-":
        sys.stdout.write(_json(results))
        return
    if json_file:
        Path(json_file).write_text(_json(results), encoding="utf-8")
    for line in lint_text.lines(results, settings_text.output_width()):
        typer.echo(line)


def _check(
    run_file: str | None,
    text: str | None,
    task: str | None,
    rows: int | None,
    metric: str | None,
    *,
    measure: bool,
) -> None:
    """Raise ``BadInput`` for options that do not fit together."""
    problems = []
    if run_file is None:
        if text is None:
            problems.append("lint: nothing to read; name a RUN.yaml or pass --text TEXT")
        if task is not None:
            problems.append("--task: names a task of a run file; name the RUN.yaml, too")
        if measure:
            problems.append(
                "--measure: needs the rows and the base of a run file; name the RUN.yaml, too"
            )
    for name, value in (("rows", rows), ("metric", metric)):
        if value is not None and not measure:
            problems.append(f"--{name}: is used with --measure only; add it")
    if text is not None and not text.strip():
        problems.append("--text: is empty; pass an instruction in words")
    if metric is not None and metric not in METRICS:
        problems.append(
            f"--metric: {metric!r} is not a metric{did_you_mean(metric, METRICS)}; known: "
            f"{', '.join(METRICS)}"
        )
    if problems:
        raise BadInput(problems)


def _of_run(options: Options) -> list[CheckedText]:
    return _unmeasured(checked_instructions(load(options.run_file, options.overrides), options))


def _unmeasured(checked: Sequence[Checked]) -> list[CheckedText]:
    return [unmeasured(each.instruction, each.findings) for each in checked]


def _measured(options: Options, processes: int | None) -> list[CheckedText]:
    """Measure the rewrites on all ranks; the results are in a file, which rank 0 writes."""
    config = load(options.run_file, options.overrides)
    checked = checked_instructions(config, options)
    check_measurable(config, checked, options)
    if not to_measure(checked):
        messages.note(nothing_to_measure(checked))
        return _unmeasured(checked)
    preflight.check_config(config, trains=False)
    folder = results_folder(config.output_dir)
    report = start_ranks("trainer.commands.lint", options.arguments(), str(folder), processes, None)
    if report.code:
        messages.show(report)
        raise typer.Exit(report.code)
    return LintResults.model_validate(read_json_object(folder / RESULTS)).prompts


def _json(results: Sequence[CheckedText]) -> str:
    content = LintResults(prompts=list(results)).model_dump(mode="json")
    return to_json(content, indent=2, ensure_ascii=False) + "\n"
