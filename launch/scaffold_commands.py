"""The commands ``promptshard init`` and ``promptshard examples``, which write run files."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from launch.arguments import path_argument
from trainer.config import SHIPPED
from trainer.runtime.errors import BadInput

#: The folder as a path begins with it, in the shipped run files.
_PREFIX = re.compile(r"(?<![\w./-])examples/")


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
    typer.echo("  promptshard train quickstart.yaml    about a minute, without a GPU")


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
        generates = path.suffix in (".py", ".pyc") or path.name == "scenes.json"
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
