"""The command ``promptshard generate``."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from launch import completion, messages, preflight
from launch.arguments import InferenceProcesses, RunDir, option
from launch.start import start_ranks
from trainer.runtime.errors import BadInput

#: Value of --input that reads stdin.
STDIN = "-"


def generate(
    run_dir: RunDir,
    prompt: Annotated[
        str, option("NAME", "Name of the prompt.", autocompletion=completion.prompt_names)
    ],
    text: Annotated[
        str | None,
        option(
            "TEXT",
            "Input text; -: stdin. Filled into the task's input template if that has exactly one "
            "column that is not optional; otherwise used verbatim. [default: stdin, if it is not a "
            "terminal]",
            "--input",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, option("N", "Maximum number of tokens. [default: the task's]", min=1)
    ] = None,
    processes: InferenceProcesses = None,
) -> NoReturn:
    """Generate text with a trained prompt.

    Stdout gets the text and nothing else. It ends at an end token of the base model's
    generation_config.json, at EOS if the task has append_eos, or before a string of the task's
    stop.

    **Examples:**

    - `promptshard generate runs/quickstart --prompt triage --input "Chest pain."`
    - `promptshard generate runs/quickstart --prompt triage < note.txt`
    """
    preflight.check_result(run_dir, prompt)
    if text is None or text == STDIN:
        text = _from_stdin(required=text == STDIN)
    # --name=VALUE as one argument: a text may start with a dash
    arguments = [run_dir, f"--prompt={prompt}", f"--input={text}"]
    if max_new_tokens is not None:
        arguments.append(f"--max-new-tokens={max_new_tokens}")
    module = "trainer.commands.generate"
    report = start_ranks(module, arguments, run_dir, processes, None, single=True)
    messages.show(report)
    raise typer.Exit(report.code)


def _from_stdin(*, required: bool) -> str:
    """Read stdin to its end, without the last line break.

    Raises:
        BadInput: it is a terminal and not ``required``, has no text, or is not UTF-8.
    """
    if not required and sys.stdin.isatty():
        raise BadInput("--input: is missing; give a text, or - to read it from stdin")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"--input: stdin is not UTF-8 at byte {error.start}; convert it") from None
    if not text.strip():
        raise BadInput("--input: stdin has no text; give a text with --input TEXT")
    return text.removesuffix("\n")
