"""The commands ``promptshard init`` and ``promptshard examples``, which write run files."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from launch import data_folders, preflight, run_templates
from launch.arguments import as_path, option, path_argument
from launch.run_templates import KINDS, Request
from trainer.config import SHIPPED, load
from trainer.config.schema import FILE_NAME, schema_text
from trainer.runtime import atomic_io
from trainer.runtime.errors import EXIT_BAD_INPUT, BadInput, did_you_mean

#: The folder as a path begins with it, in the shipped run files.
_PREFIX = re.compile(r"(?<![\w./-])examples/")


def init(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND", help=f"{', '.join(KINDS)}.", autocompletion=lambda: list(KINDS.items())
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE", callback=as_path, help="The new run file. [default: KIND.yaml]"
        ),
    ] = None,
    model: Annotated[
        str | None,
        option(
            "MODEL",
            "A model's folder, GGUF file or hub id. [default: a tiny model]",
            callback=as_path,
        ),
    ] = None,
    train: Annotated[
        str | None,
        option(
            "FILE",
            "Rows to train on: a file, a glob, a folder or hf://NAME. Its columns are filled in. "
            "[default: example rows]",
            callback=as_path,
        ),
    ] = None,
    validation: Annotated[
        str | None,
        option("FILE", "Rows to measure quality. [default: a tenth of --train]", callback=as_path),
    ] = None,
    output_dir: Annotated[
        str | None,
        option("DIR", "Output folder of the run. [default: runs/NAME_OF_FILE]", callback=as_path),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing FILE.")] = False,
) -> None:
    """Write a run file to start from, in which every setting is explained.

    Without `--model` and `--train` the file works at once, with a tiny model and example rows.
    `run-file.schema.json` is written beside it, for editors with the YAML language server.

    **Examples:**

    - `promptshard init classify`
    - `promptshard init classify mine.yaml --train reviews.csv --model meta-llama/Llama-3.2-3B`
    - `promptshard init chat --train dialogues.jsonl`
    """
    if kind is None:
        typer.echo("Name the kind of run file: promptshard init KIND", err=True)
        for name, text in KINDS.items():
            typer.echo(f"  {name:{max(map(len, KINDS))}}  {text}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT)
    if kind not in KINDS:
        hint = did_you_mean(kind, list(KINDS))
        problem = f"init: {kind!r} is not a kind{hint}; known: {', '.join(KINDS)}"
        if Path(kind).exists():
            problem += f"; name the kind, then the data: promptshard init KIND --train {kind}"
        raise BadInput(problem)
    target = Path(file or f"{kind}.yaml")
    _check_target(target, force)
    request, notes = data_folders.with_splits(
        Request(
            kind,
            file=str(target),
            output_dir=output_dir or str(Path("runs", target.stem)),
            model=model or None,
            train=train or None,
            validation=validation or None,
        )
    )
    text, more = run_templates.render(request)
    with tempfile.TemporaryDirectory() as folder:  # check before FILE changes
        checked = Path(folder, target.name)
        checked.write_text(text, encoding="utf-8")
        preflight.check_paths(load(checked))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write(target, text)
        atomic_io.write(target.parent / FILE_NAME, schema_text())
    except OSError as error:
        raise BadInput(f"{target}: cannot be written: {error.strerror}") from None
    shown = shlex.quote(str(target))
    typer.echo(f"wrote {target}: {KINDS[kind]}")
    typer.echo(f"wrote {target.parent / FILE_NAME}: completes and checks run files in editors")
    for note in notes + more:
        typer.echo(f"note: {note}")
    typer.echo("next:")
    typer.echo(f"  promptshard validate {shown}    check settings and data")
    typer.echo(f"  promptshard train {shown}")


def _check_target(target: Path, force: bool) -> None:
    if target.suffix not in (".yaml", ".yml"):
        problem = f"{target}: the name of a run file ends in .yaml"
        if target.exists():
            problem += "; name data with --train, and put a glob in quotes"
        raise BadInput(problem)
    if target.is_dir():
        raise BadInput(f"{target}: is a folder; name a new file")
    if target.exists() and not force:
        raise BadInput(f"{target}: exists; name another file, or replace it with --force")


def examples(
    folder: Annotated[str, path_argument("DIR", "A new or empty folder.")],
) -> None:
    """Copy the example run files with their data and a tiny base model.

    The copied run files work inside DIR, and are yours to change.

    **Example:** `promptshard examples work`, then `cd work` and
    `promptshard train quickstart.yaml`
    """
    target = Path(folder)
    _check_empty(target)
    try:
        for file in _shipped():
            _copy(SHIPPED / "examples" / file, target / file)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {error.strerror}") from None
    titles = {file.name: _title(file) for file in sorted(target.glob("*.yaml"))}
    typer.echo(f"copied {len(titles)} run files, their data and a tiny base model to {folder}:")
    width = max(map(len, titles))
    for name, title in titles.items():
        typer.echo(f"  {name:{width}}  {title}")
    typer.echo("next:")
    typer.echo(f"  cd {shlex.quote(folder)}")
    typer.echo("  promptshard train quickstart.yaml    a few minutes, without a GPU")


def _check_empty(folder: Path) -> None:
    """Raise ``BadInput`` unless the folder is empty or can be created."""
    try:
        if next(folder.iterdir(), None) is not None:
            raise BadInput(f"{folder}: is not empty; name a new or empty folder")
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise BadInput(f"{folder}: is a file; name a new or empty folder") from None
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read: {error.strerror}") from None


def _shipped() -> Iterator[Path]:
    """Yield the shipped files, relative to their folder, without those that only generate them."""
    folder = SHIPPED / "examples"
    for path in sorted(folder.rglob("*")):
        own = path.parent == folder and path.suffix == ".py"
        generates = own or path.suffix == ".pyc" or path.name == "scenes.json"
        if path.is_file() and not generates:
            yield path.relative_to(folder)


def _copy(source: Path, target: Path) -> None:
    """Copy a file; in a run file, make paths relative to the copy instead of the repository."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".yaml":
        text = source.read_text(encoding="utf-8")
        target.write_text(_PREFIX.sub("", text), encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def _title(run_file: Path) -> str:
    """Return the beginning of the first sentence in a run file's comments."""
    lines = run_file.read_text(encoding="utf-8").splitlines()
    comments = (line.removeprefix("# ") for line in lines if line.startswith("# "))
    return next((re.split("[:;,.]", text)[0] for text in comments if text.endswith(".")), "")
