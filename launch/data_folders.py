"""Find the splits of ``promptshard init --train``, of a folder or of a data set of the hub."""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from launch import column_sample
from launch.run_templates import Request
from trainer.config import DataSource, WrittenSource, resolve_path
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from trainer.data.split_files import SplitPair

#: Maximum number of names in a message.
_SHOWN = 20
#: Number of rows whose columns are compared.
_FIRST_ROWS = 100


def with_splits(request: Request) -> tuple[Request, list[str]]:
    """Replace a folder by its rows to train on; also name rows to validate on, if it has any.

    Likewise for a data set of the hub.

    Returns:
        The request, and notes.

    Raises:
        BadInput: the folder has several configurations or splits to train on.
    """
    from trainer.data.split_files import split_pairs  # loads Arrow only where rows are read
    from trainer.data.table_readers import saved_splits

    if not isinstance(request.train, str):
        return request, []
    if request.train.startswith("hf://"):
        return _of_hub(request, request.train)
    folder = Path(request.train)
    if not resolve_path(request.train).is_dir() or (folder / "state.json").is_file():
        return request, []
    pairs = split_pairs(folder)
    if len(pairs) > 1:
        raise BadInput(_choice(request, folder, pairs))
    if not pairs:
        if names := saved_splits(folder):
            raise BadInput(
                f"--train: {folder}: has no split 'train'; it has {', '.join(names)}: name one as "
                f"--train {shlex.quote(str(folder / names[0]))}"
            )
        return request, []
    return _with_pair(request, pairs[0], str(folder))


def _of_hub(request: Request, train: str) -> tuple[Request, list[str]]:
    from trainer.data.split_files import pairs_of
    from trainer.data.table_readers import hub_splits

    source = DataSource.model_validate(train)
    names = hub_splits(source)
    settings = source.model_dump(include={"hub", "name"}, exclude_none=True)
    splits: dict[str, WrittenSource] = {name: settings | {"split": name} for name in names}
    pairs = list(pairs_of("", splits | {name: train for name in names if name == "train"}))
    if not pairs:  # reported where the rows are read
        return request, []
    pair = next((pair for pair in pairs if pair.validation_split), pairs[0])
    request, notes = _with_pair(request, pair, train)
    if others := [other.train_split for other in pairs if other != pair]:
        notes.append(
            f"train rows are those of the split {pair.train_split}; others: {', '.join(others)}"
        )
    return request, notes


def _with_pair(request: Request, pair: SplitPair, place: str) -> tuple[Request, list[str]]:
    """Use the rows of a pair; an option for validation rows is kept."""
    request = replace(request, train=pair.train)
    if request.validation is not None or pair.validation is None:
        return request, []
    split = f"the split {pair.validation_split} in {place}"
    if problem := _problem_of_validation(pair):
        return request, [f"{split} is not used for validation: {problem}"]
    return replace(request, validation=pair.validation), [f"validation rows are those of {split}"]


def _problem_of_validation(pair: SplitPair) -> str:
    """Say why the first rows to validate on have no labels; empty if they seem to have them."""
    assert pair.validation is not None
    try:
        known, columns = (_columns(source) for source in (pair.train, pair.validation))
    except BadInput as error:  # class number -1, for example
        return error.problems[0].removeprefix("--train: ")
    missing = [name for name in known if name not in columns]
    return f"it has no column {missing[0]!r}" if missing else ""


def _columns(source: WrittenSource) -> list[str]:
    """Return the columns of the first rows."""
    from trainer.data.data_files import find_files

    first = source[0] if isinstance(source, list) else source
    file = find_files(DataSource.model_validate(column_sample.escape(first)), "--train", "train")[0]
    records = islice(file.records(file.readable()), _FIRST_ROWS)
    return list(dict.fromkeys(name for record in records for name in record.values))


def _choice(request: Request, folder: Path, pairs: list[SplitPair]) -> str:
    """List configurations or splits, and the command for the first one."""
    configs = list(dict.fromkeys(pair.config or "(files of no configuration)" for pair in pairs))
    several = len(configs) > 1
    names = configs if several else [pair.train_split for pair in pairs]
    kind = "configurations" if several else "splits to train on"
    more = ", ..." if len(names) > _SHOWN else ""
    problem = (
        f"--train: {folder}: has {len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}; name the "
        "rows of one"
    )
    command = _command(request, folder, pairs[0])
    return f"{problem}: {command}" if command else f"{problem} in the run file"


def _command(request: Request, folder: Path, pair: SplitPair) -> str:
    """Return the command for one pair of splits; empty if no option can name its files."""
    train, validation = _option(pair.train), _option(pair.validation)
    if not train or (validation is None) != (pair.validation is None):
        return ""
    file = [] if request.file == f"{request.kind}.yaml" else [request.file]
    options = ["--train", train, *(["--validation", validation] if validation else [])]
    options += ["--model", request.model] if request.model else []
    return shlex.join(["promptshard", "init", request.kind, *file, *options])


def _option(source: WrittenSource | None) -> str | None:
    """Return a source as an option names it; None if it cannot."""
    if isinstance(source, dict):  # a split of a saved folder is a folder itself
        return str(Path(source["path"], source["split"]))
    return source if isinstance(source, str) else None
