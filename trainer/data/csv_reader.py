"""Read csv and tsv files as records, with the line of every mistake. Imports no torch.

Both have the same rules for quotes, as by default in ``pandas.read_csv`` and ``datasets``: a field
that begins with a quote ends at the next single quote, in whatever line that is.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.text_readers import BOM, FileRecord, bad_utf8, format_of, open_text, shorten
from trainer.runtime.errors import BadInput

#: Number of lines like rows from which a field is refused. Texts may have a few such lines.
_MANY_LINES = 100
#: Number of rows whose values are compared with the names of the columns.
_COMPARED_ROWS = 10_000
#: Number of words of a name of a column that seems to be a text.
_WORDS = 6


def csv_header(file: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Read the header of a csv file: (column names, iterator of (line, fields) of the rows)."""
    csv.field_size_limit(sys.maxsize)  # the default limit is 128 kB
    delimiter = _delimiter(file)
    _check_delimiter(file, delimiter)
    rows = _fields(file, csv.reader(_lines(file), delimiter=delimiter, strict=True))
    _, names = next(rows, (0, []))
    # Spreadsheets write columns without a name at the end of lines; templates cannot use them.
    twice = sorted({name for name in names if name.strip() and names.count(name) > 1})
    if twice:
        raise BadInput(f"{file}:1: duplicate column {twice[0]!r} in the header; rename one")
    if not any(names):
        raise BadInput(f"{file}:1: no header; the first line names the columns")
    return names, rows


def _delimiter(file: Path) -> str:
    return "\t" if format_of(file) == ".tsv" else ","


def _check_delimiter(file: Path, delimiter: str) -> None:
    """Refuse a header whose names are separated by another character, as Excel writes in Europe."""
    header = next((line.splitlines()[0] for line in _lines(file) if line.strip()), "")
    if delimiter in header:
        return
    for other in (";", "\t", "|", ","):
        if len(next(csv.reader([header], delimiter=other))) > 1:
            raise BadInput(
                f"{file}:1: the columns are separated by {other!r}; separate the fields with "
                f"commas (.csv) or tabs (.tsv), as pandas.read_csv(FILE, sep={other!r})"
                ".to_csv(NEW_FILE, index=False) does"
            )


def _lines(file: Path) -> Iterator[str]:
    """Split at newlines only: ``str.splitlines`` also splits at other characters in a field."""
    with open_text(file) as lines:
        for number, raw in enumerate(lines, start=1):
            raw = raw.removeprefix(BOM) if number == 1 else raw
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{file}:{number}: {bad_utf8(raw, error)}") from None


def _fields(file: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of every csv row that is not blank."""
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        what = str(error)
        if "end of data" in what:
            what = f'a quote (") is opened but not closed; {_quotes(file)}'
        elif "expected after" in what:
            last = reader.line_num
            end = "" if last == line else f" that ends in line {last}"
            what = f'a field begins with a quote ("), but text follows its closing quote{end}'
            what += f"; {_quotes(file)}"
        elif "new-line" in what:
            what = "a line ends with a carriage return alone; save it with newlines at line ends"
        raise BadInput(f"{file}:{line}: not valid csv: {what}") from None


def _quotes(file: Path) -> str:
    """Return the remedy for a text that begins with a quote."""
    if format_of(file) != ".tsv":
        return 'write "" for a quote (not \\"), and put the text in quotes'
    return (
        'if the quotes are plain characters, convert the file: pandas.read_csv(FILE, sep="\\t", '
        'quoting=3).to_json("NEW.jsonl", orient="records", lines=True)'
    )


def read_csv(file: Path) -> Iterator[FileRecord]:
    """Read a csv file with a header; ``.tsv`` files are separated by tabs."""
    names, rows = csv_header(file)
    for row, (line, fields) in enumerate(rows, start=1):
        problem = _problem(file, names, fields, line)
        yield FileRecord(
            row, line, {} if problem else dict(zip(names, fields, strict=True)), problem
        )


def _problem(file: Path, names: Sequence[str], fields: Sequence[str], line: int) -> str | None:
    last = line + "".join(fields).count("\n")
    lines = f" begins with a quote and ends in line {last}"
    if len(fields) != len(names):
        long = "" if last == line else f"; a field{lines}: {_quotes(file)}"
        return (
            f"has {len(fields)} fields where the header has {len(names)} "
            f"({', '.join(names)}): {shorten(fields)}"
            + (long or "; put text with commas in quotes")
        )
    if len(names) > 1 and fields == names:
        return (
            "repeats the first line, which names the columns; remove this row, or, if the file has "
            "no column names, add a line with them at its beginning"
        )
    column = _column_of_rows(fields, _delimiter(file))
    if column is None:
        return None
    return f"{names[column]}:{lines}; the lines between look like rows: {_quotes(file)}"


def _column_of_rows(fields: Sequence[str], delimiter: str) -> int | None:
    """Return the column of a field that contains many rows, because of a stray quote.

    Its lines have exactly the delimiters of rows.
    """
    others = len(fields) - 1
    for column, field in enumerate(fields):
        if not others or field.count("\n") < _MANY_LINES or field.endswith("\n"):
            continue
        first, *between, last = (line.count(delimiter) for line in field.split("\n"))
        if first == others - column and last == column and set(between) == {others}:
            return column
    return None


def missing_header(file: Path) -> str:
    """Say why the first line may be a row; empty if it seems to name the columns.

    A name is also a label in its column, a number above numbers, or a sentence above sentences.
    """
    names, rows = csv_header(file)
    columns: list[list[str]] = [[] for _ in names]
    for _, fields in islice(rows, _COMPARED_ROWS):
        for values, field in zip(columns, fields, strict=False):
            values.append(field)
    named = [name for name in names if name]
    if not columns[0] or named == [str(n) for n in range(len(named))]:  # numbered by pandas
        return ""
    for name, values in zip(names, columns, strict=True):
        if name.strip() and name in values and 2 * len(set(values)) <= len(values):
            return f"{shorten(name)} is also a label in its column"
        if all(map(is_number, (name, *values))):
            return f"{shorten(name)} is a number like all values of its column"
        if _num_words(name) >= _WORDS and _num_words(*values) >= _WORDS:
            return f"{shorten(name)} is as long as the texts of its column"
    return ""


def is_number(text: str) -> bool:
    """Whether a text is a decimal number, with white space around it."""
    return re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", text) is not None


def _num_words(*texts: str) -> float:
    """Return the mean number of words of texts."""
    return sum(len(text.split()) for text in texts) / len(texts)
