"""Words that the shell completes: run files, prompts of a run, settings of KEY=VALUE.

A function returns nothing if anything fails; the shell then completes file names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import islice
from pathlib import Path

import typer

from trainer.config import reference, yaml_source
from trainer.prompts.formats.target_names import TARGET_NAMES

Completion = Callable[[typer.Context, str], list[str]]
#: Maximum number of words and of folder entries, so that completion is fast everywhere.
MAX_WORDS, MAX_ENTRIES = 500, 2000


def _completion(words: Callable[[typer.Context, str], Iterator[str]]) -> Completion:
    """Make a completion of a generator of words; keep those that begin like the typed word."""

    @wraps(words)
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            possible = islice(words(ctx, incomplete), MAX_ENTRIES)
            return list(islice((w for w in possible if w.startswith(incomplete)), MAX_WORDS))
        except Exception:  # an error must not appear in the command line that is typed
            return []

    return complete


@_completion
def run_files(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Yield the YAML files of the typed folder and of the folders in it."""
    folder = incomplete.rpartition("/")[0]
    prefix = f"{folder}/" if "/" in incomplete else ""
    for name in sorted(os.listdir(os.path.expanduser(prefix) or ".")):
        path = os.path.join(os.path.expanduser(prefix), name)
        if name.startswith(".") or not f"{prefix}{name}".startswith(incomplete[: len(prefix) + 1]):
            continue
        if name.endswith((".yaml", ".yml")):
            yield f"{prefix}{name}"
        elif os.path.isdir(path):
            inside = sorted(islice(os.listdir(path), MAX_ENTRIES))
            yield from (f"{prefix}{name}/{n}" for n in inside if n.endswith((".yaml", ".yml")))


@_completion
def prompt_names(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Yield the trained prompts in the RUN_DIR that was typed before."""
    # before an option without its value, click leaves arguments in ctx.args
    for folder in filter(None, [ctx.params.get("run_dir"), *ctx.args]):
        prompts = Path(folder, "prompts")
        if prompts.is_dir():
            yield from sorted(os.listdir(prompts))


@_completion
def export_targets(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Yield the targets of ``promptshard export --to``."""
    yield from TARGET_NAMES


@_completion
def overrides(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Yield ``KEY=`` of every setting; tasks and prompts by their names in the run file."""
    run_file = ctx.params.get("run_file")
    data = yaml_source.saved(Path(run_file)) if run_file else {}
    for key in reference.settings():
        section, _, setting = key.partition(".")
        if section not in ("tasks", "prompts"):
            yield f"{key}="
        elif setting:
            items = data.get(section) or []
            yield from (f"{section}.{item['name']}.{setting}=" for item in items)
