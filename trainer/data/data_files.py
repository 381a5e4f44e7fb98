"""Find the files and tables of a setting such as ``train``. Imports no torch."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.config import SHIPPED, DataSource, resolve_path
from trainer.data.csv_reader import csv_header, missing_header, read_csv
from trainer.data.json_reader import read_json_rows, read_jsonl
from trainer.data.split_files import split_pairs
from trainer.data.table_readers import TABLE_FORMATS, Table, open_hub, open_table, saved_files
from trainer.data.text_readers import (
    GZIP,
    TEXT_FORMATS,
    FileRecord,
    format_of,
    read_txt,
)
from trainer.runtime.errors import BadInput, did_you_mean

FORMATS = (*TEXT_FORMATS, *TABLE_FORMATS)
#: Remedies for unsupported formats.
_REMEDIES = {
    GZIP: f"only {', '.join(TEXT_FORMATS)} may be compressed: name it as data.jsonl.gz",
    ".zst": "decompress it (zstd -d)",
    ".bz2": "decompress it (bunzip2)",
    ".xz": "decompress it (unxz)",
    ".zip": "unpack it",
    ".xlsx": "save it as .csv",
    ".xls": "save it as .csv",
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_GLOB = ("*", "?", "[")


@dataclass(frozen=True)
class DataFile:
    """One file or table.

    Attributes:
        name: of the file or table, for messages.
        files: the file or, for a hub data set, all its files.
        hub: the table of a hub data set.
    """

    name: str
    files: tuple[Path, ...]
    hub: Table | None = None

    @cached_property
    def table(self) -> Table | None:
        """The table; None for text formats. Raises ``BadInput`` if the file is damaged."""
        if self.hub is not None:
            return self.hub
        file = self.files[0]
        return open_table(file) if format_of(file) in TABLE_FORMATS else None

    def header(self) -> list[str] | None:
        """Return all columns; None for JSON, in which every row has its own."""
        if self.table is not None:
            return self.table.names
        kind = format_of(self.files[0])
        if kind == ".txt":
            return ["text"]
        return csv_header(self.files[0])[0] if kind in (".csv", ".tsv") else None

    def note_of_header(self) -> str:
        """Return a note if the header of a csv file may be a row; empty otherwise."""
        if not self.files or self.table is not None:  # rows in memory have no file
            return ""
        is_csv = format_of(self.files[0]) in (".csv", ".tsv")
        reason = missing_header(self.files[0]) if is_csv else ""
        if not reason:
            return ""
        return (
            f"the first line is read as column names, but {reason}; if it is a row, add a line "
            "with column names before it"
        )

    def readable(self) -> list[str]:
        """Return the columns of ``header`` that can be read; empty for JSON."""
        return self.table.supported() if self.table is not None else self.header() or []

    def class_names(self, column: str) -> list[str] | None:
        """Names of the classes of a table's column of class numbers; otherwise None."""
        return None if self.table is None else self.table.class_names(column)

    def records(self, columns: Sequence[str], keep: Collection[str] = ()) -> Iterator[FileRecord]:
        """Yield every row, in order; a malformed row comes with its problem.

        Args:
            columns: the used columns. Of a table, only these are read. In a JSON file, an object
                with one of these keys is a row; otherwise it contains the rows.
            keep: columns of a table whose outermost objects keep keys that are null.

        Raises:
            BadInput: the file, or the rest of it, cannot be read.
        """
        file = self.files[0]
        kind = format_of(file)
        if self.table is not None:
            for row, values in enumerate(self.table.rows(columns, keep), start=1):
                yield FileRecord(row, None, values)
        elif kind in (".csv", ".tsv"):
            yield from read_csv(file)
        elif kind == ".txt":
            yield from read_txt(file)
        else:
            yield from read_jsonl(file) if kind == ".jsonl" else read_json_rows(file, columns)

    def digest(self) -> str:
        """Return the SHA-256 of the files' bytes, in hex."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def find_files(source: DataSource, setting: str, split: str) -> list[DataFile]:
    """Find the files and tables of one source, in a fixed order.

    Args:
        setting: name of the setting, for messages.
        split: the split to read if the source has several and does not name one.

    Raises:
        BadInput: there are no files, or a file cannot be read.
    """
    split = source.split or split
    try:
        if source.path is None:
            table, files = open_hub(source, split)
            return [DataFile(table.name, tuple(files), table)]
        if source.path.startswith(("https://", "http://")):
            raise BadInput(f"{source.path}: is a URL; {_remedy_of_url(source.path)}")
        path = resolve_path(source.path)
        if any(mark in source.path for mark in _GLOB) and not path.exists():
            return [_data_file(file) for file in _matches(source.path)]
        saved = saved_files(path, split) if path.is_dir() else None
        if saved is not None:
            return [_data_file(file) for file in saved]
        if source.split is not None:
            raise BadInput(f"{source.path}: a file has no splits; remove split")
        return [_data_file(path, source.path)]
    except BadInput as error:
        raise BadInput([f"{setting}: {problem}" for problem in error.problems]) from None


def _remedy_of_url(url: str) -> str:
    page = re.match(r"https://huggingface\.co/datasets/([\w.-]+(?:/[\w.-]+)?)/?$", url)
    return f"write hf://{page[1]}" if page else "download the file, and name it"


def _matches(pattern: str) -> list[Path]:
    paths = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = paths or glob.glob(str(SHIPPED / pattern), recursive=True)
    files = sorted(Path(path) for path in paths if os.path.isfile(path))
    if not files:
        raise BadInput(f"{pattern}: matches no file; paths start at {os.getcwd()}")
    return files


def _data_file(file: Path, name: str | None = None) -> DataFile:
    problem = _problem_of_file(file)
    if problem:
        raise BadInput(f"{name or file}: {problem}")
    return DataFile(str(file), (file,))


def _problem_of_file(file: Path) -> str | None:
    kind = format_of(file)
    if file.is_dir():
        inside = sorted(f.name for f in file.iterdir() if format_of(f) in FORMATS)
        files = f"; it holds {', '.join(inside[:5])}" if inside else ""
        if not inside and len(pairs := split_pairs(file)) == 1:
            files = f"; its rows to train on are {pairs[0].train}"
        return f"is a folder; name data files ({', '.join(FORMATS)}), as {file.name}/*.jsonl{files}"
    if not file.exists():
        if not kind and len(file.parts) <= 2:
            return f"no such file; a data set of the hub is written hf://{file}"
        if not file.parent.is_dir():
            return f"no such file: there is no folder {str(file.parent)!r}"
        near = did_you_mean(file.name, [f.name for f in file.parent.iterdir()])
        return f"no such file{near}; paths start at the working folder, {os.getcwd()}"
    if kind not in FORMATS:
        remedy = _REMEDIES.get(file.suffix.lower(), f"use {', '.join(FORMATS)}")
        return f"format {kind or 'without a suffix'!r} is not known; {remedy}"
    if not os.access(file, os.R_OK):
        return "is not readable; change its permissions"
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return "is a pointer of Git LFS, not the data; run `git lfs pull` in its folder"
    return "is empty; it has no rows" if file.stat().st_size == 0 else None
