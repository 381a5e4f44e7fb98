"""The command ``promptshard export``."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from launch import completion, preflight
from launch.arguments import NewFolder, RunDir, option
from launch.start import run_alone
from trainer.prompts.formats.target_names import TARGET_NAMES, check_target_name
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.runtime.errors import BadInput


class PeftType(enum.StrEnum):
    """PEFT types of keys and values."""

    PREFIX_TUNING = "prefix_tuning"
    CARTRIDGE = "cartridge"


def export(
    run_dir: RunDir,
    out: NewFolder,
    prompt: Annotated[
        str | None,
        option("NAME", "The trained prompt.", autocompletion=completion.prompt_names),
    ] = None,
    to: Annotated[
        str | None,
        option(
            "TARGET",
            f"The program that reads it: {', '.join(TARGET_NAMES)}.",
            autocompletion=completion.export_targets,
        ),
    ] = None,
    peft_type: Annotated[
        PeftType | None,
        typer.Option(
            help="With --to peft, for keys and values: PEFT's prefix tuning, or CARTRIDGE (PEFT "
            "0.20). [default: prefix_tuning]"
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        option(
            "NAME",
            "In place of --prompt: a shared encoder, or a prompt with `encoder: text`, that "
            "encodes a new text.",
        ),
    ] = None,
    text: Annotated[
        str | None, option("TEXT", "With --encoder: description of the new task.")
    ] = None,
) -> None:
    """Write a trained prompt for another program, or encode a new text as a prompt.

    With `--prompt` and `--to`, OUT has the files that the program reads, a script that uses them,
    and a README.md with the commands. The base is not loaded: only its tokenizer and the headers
    of its weight files are read.

    With `--encoder` and `--text`, OUT becomes a PEFT adapter of a new task, without training. It is
    made by the encoder of the best validation step (or the latest checkpoint).

    **Examples:**

    - `promptshard export runs/quickstart out --prompt triage --to vllm`
    - `promptshard export runs/notes urgency --encoder reader --text "Is it urgent?"`
    """
    options = _options(prompt, to, peft_type, encoder, text)
    run = preflight.check_result(run_dir, prompt)
    if prompt is not None and not (Path(run_dir) / "prompts" / prompt / WEIGHTS).is_file():
        raise BadInput(f"{run_dir}: prompt {prompt!r} is not saved yet; finish the run first")
    if not run.prompts:
        raise BadInput(f"{run_dir}: has no prompts")
    if os.path.lexists(out):
        raise BadInput(f"{out}: already exists; give a new folder")
    raise typer.Exit(run_alone("trainer.commands.export", [*options, "--", run_dir, out]))


def _options(
    prompt: str | None,
    to: str | None,
    peft_type: PeftType | None,
    encoder: str | None,
    text: str | None,
) -> list[str]:
    """Return the options of one of the two modes; raises ``BadInput`` for other combinations."""
    given = {"--prompt": prompt, "--to": to, "--encoder": encoder, "--text": text}
    names = {name for name, value in given.items() if value is not None}
    if names not in ({"--prompt", "--to"}, {"--encoder", "--text"}):
        raise BadInput(
            f"export: give --prompt and --to (one of {', '.join(TARGET_NAMES)}) for a trained "
            "prompt, or --encoder and --text for a new text"
        )
    if to is not None:
        check_target_name(to)
    if peft_type is not None and to != "peft":
        raise BadInput("--peft-type: works with --to peft only; remove it")
    given["--peft-type"] = None if peft_type is None else peft_type.value
    # --name=VALUE as one argument: a text may start with a dash
    return [f"{name}={value}" for name, value in given.items() if value is not None]
