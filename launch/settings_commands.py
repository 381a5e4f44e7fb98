"""The commands ``promptshard settings`` and ``promptshard schema``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from launch import settings_text
from trainer.config import reference
from trainer.config.schema import schema_text


def settings(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A section (prompts.init), a setting (prompts.learning_rate, learning_rate) or "
            "another trainer's name for one (lr).",
            show_default="all settings",
            autocompletion=lambda: list(reference.settings()),
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with one object per setting.")
    ] = False,
) -> None:
    """Explain the settings of the run file: type, default and meaning.

    Without NAME: all settings, one line each.

    **Examples:**

    - `promptshard settings`
    - `promptshard settings prompts.init`
    - `promptshard settings learning_rate`
    - `promptshard settings batch_size` (what promptshard calls it)
    """
    names, note = (None, None) if name is None else reference.find(name)
    if as_json:
        typer.echo(json.dumps([asdict(s) for s in _chosen(names)], indent=2, ensure_ascii=False))
        if note is not None:
            typer.echo(note, err=True)
        return
    for line in settings_text.wrap(note or "", settings_text.output_width()):
        typer.echo(line)
    for line in _lines(names):
        typer.echo(line)


def schema() -> None:
    """Print the JSON schema of the run file (draft 2020-12), for editors and other tools.

    The examples come with it as `run-file.schema.json`. An editor with the YAML language server
    (VS Code: the extension YAML by Red Hat) completes, explains and checks a run file beside it
    that begins with this line:

    `# yaml-language-server: $schema=run-file.schema.json`

    **Example:** `promptshard schema > run-file.schema.json`
    """
    typer.echo(schema_text(), nl=False)


def _chosen(names: list[str] | None) -> Iterator[reference.Setting]:
    """Yield the named settings, and all settings of the named sections."""
    for name, setting in reference.settings().items():
        if names is None or any(name == n or name.startswith(f"{n}.") for n in names):
            yield setting


def _lines(names: list[str] | None) -> Iterator[str]:
    width = settings_text.output_width()
    if names is None:
        yield from settings_text.overview(width)
        return
    for i, name in enumerate(names):
        yield from [""] * (i > 0)
        section = reference.sections().get(name)
        if section is not None and len(names) == 1:
            yield from settings_text.describe_section(section, width)
        else:
            yield from settings_text.describe(reference.settings()[name], width)
