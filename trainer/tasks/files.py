"""Data files -> records, with a diagnosis for whatever is wrong. Imports no torch.

``datasets`` and Arrow say *that* a file is broken, seldom where, and they repair silently: a column
of dates becomes timestamps, a csv field ``NA`` becomes null, a short csv line is filled up. So the
files are read here, value by value as they are written, and every problem gets its line or row.
Formats that are tables already (parquet, arrow) are read in tables.py.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.errors import BadInput
from trainer.jsonfile import check_depth

#: By the end of a file's name; each may be compressed, as .jsonl.gz.
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
GZIP = ".gz"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One row as the file has it, or what is wrong with it.

    Attributes:
        row: number of the row, from 1; lines that are broken count.
        line: number of its line, from 1, where the format has lines.
        values: column -> value; empty if ``problem`` is given.
        problem: what is wrong and the remedy, without the place.
    """

    row: int
    line: int | None
    values: dict[str, Any]
    problem: str | None = None


def format_of(file: str | Path) -> str:
    """The format that a file's name ends in; ``.jsonl`` also for ``.ndjson`` and ``.jsonl.gz``."""
    file = Path(file)
    suffix = file.suffix.lower()
    if suffix == GZIP:
        inner = Path(file.stem).suffix.lower()
        suffix = inner if inner in TEXT_FORMATS else inner + suffix
    return ".jsonl" if suffix == ".ndjson" else suffix


@contextmanager
def open_text(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a text file as a stream, decompressed where its name ends in ``.gz``.

    Raises:
        BadInput: it cannot be read, or is damaged.
    """
    compressed = file.suffix.lower() == GZIP
    try:
        with gzip.open(file, "rb") if compressed else file.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{file}: is not a whole gzip file: {error}; compress it again") from None
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror or error}") from None


def place(path: str, row: int, line: int | None) -> str:
    """How a row is named in messages: ``FILE:LINE`` in jsonl and txt, else ``FILE: row N``."""
    if line is None:
        return f"{path}: row {row}"
    one_per_line = format_of(path) in (".jsonl", ".txt")
    return f"{path}:{line}" if one_per_line else f"{path}: row {row} (line {line})"


def shorten(value: Any, length: int = 60) -> str:
    """``repr`` of a value, cut for a message."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 4] + "..." + text[-1]


def read_text(file: Path, columns: Collection[str]) -> Iterator[Record]:
    """Every row of a file of one of ``TEXT_FORMATS``, in its order. Broken rows have a problem.

    Args:
        columns: those that are needed; they show whether an object is a row or holds the rows.

    Raises:
        BadInput: the file as a whole cannot be read.
    """
    kind = format_of(file)
    if kind in (".csv", ".tsv"):
        return _csv(file, delimiter_of(file))
    if kind == ".txt":
        return _txt(file)
    return _jsonl(file) if kind == ".jsonl" else _json(file, columns)


def header_of(file: Path) -> list[str] | None:
    """Columns as the file's head gives them; None for JSON, where every row has its own."""
    kind = format_of(file)
    if kind == ".txt":
        return ["text"]
    return _header(file, delimiter_of(file))[0] if kind in (".csv", ".tsv") else None


def delimiter_of(file: Path) -> str:
    return "\t" if format_of(file) == ".tsv" else ","


def _txt(file: Path) -> Iterator[Record]:
    """One row per line that is not blank, in a column ``text``."""
    row = 0
    with open_text(file) as lines:
        for number, raw in enumerate(lines, start=1):
            raw = raw.removeprefix(BOM) if number == 1 else raw
            if not raw.strip():
                continue
            row += 1
            try:
                yield Record(row, number, {"text": raw.decode("utf-8").rstrip("\r\n")})
            except UnicodeDecodeError as error:
                yield Record(row, number, {}, _bad_utf8(raw, error))


def _jsonl(file: Path) -> Iterator[Record]:
    with open_text(file) as lines:
        yield from json_lines(lines)


def json_lines(lines: Iterable[bytes], first_row: int = 1, first_line: int = 1) -> Iterator[Record]:
    """Rows of JSON Lines; blank lines count as lines only."""
    row = first_row - 1
    for number, raw in enumerate(lines, start=first_line):
        raw = raw.removeprefix(BOM) if number == 1 else raw
        if not raw.strip():
            continue
        row += 1
        values, problem = _json_line(raw)
        if problem and row == 1 and raw.strip() in (b"{", b"["):
            problem += "; a JSON Lines file has one whole object per line (a list: name it .json)"
            yield Record(row, number, {}, problem)
            return  # every other line would only repeat it
        yield Record(row, number, values, problem)


def _json_line(raw: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return {}, _bad_utf8(raw, error)
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        return (
            {},
            f"not valid JSON at column {error.colno}: {error.msg}: {_around(text, error.pos)}",
        )
    except RecursionError:
        return {}, "not readable JSON: nested too deeply"
    except ValueError as error:
        return {}, f"not valid JSON: {error}"
    return _as_row(value, suspicious="\\ud" in text.lower())


def _loads(text: str) -> Any:
    """JSON without NaN and Infinity, and without two values for one key, of which one is lost."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _around(text: str, position: int) -> str:
    """The spot of a JSON error with a few characters on either side."""
    start, end = max(0, position - 20), min(len(text), position + 20)
    if position >= len(text):
        return f"the line ends with {text[start:]!r}"
    return f"near {text[start:end]!r}"


def _as_row(value: Any, suspicious: bool) -> tuple[dict[str, Any], str | None]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")
        return {}, f'is {kind}, {shorten(value)}; a row is an object: {{"column": value, ...}}'
    try:
        check_depth(value)
    except ValueError as error:
        return {}, f"not readable JSON: {error}"
    if suspicious:  # half of a surrogate pair is legal JSON but no text that can be stored
        for column, item in value.items():
            try:
                json.dumps([column, item], ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError as error:
                bad = json.dumps(error.object[error.start : error.end])
                return (
                    {},
                    f"{ascii(column)[1:-1]}: holds half a character, {bad}; write the whole "
                    "surrogate pair",
                )
    return value, None


def _bad_utf8(raw: bytes, error: UnicodeDecodeError) -> str:
    column = len(raw[: error.start].decode("utf-8", "replace")) + 1
    hint = "it looks like UTF-16; " if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    before = raw[max(0, error.start - 15) : error.start].decode("utf-8", "ignore")
    spot = f" after {before!r}" if before else ""
    return (
        f"not UTF-8 at column {column}: byte 0x{raw[error.start]:02x}{spot}; {hint}save it as UTF-8"
    )


def _text_of(file: Path) -> str:
    """The whole file as text; a bad byte is reported with its line."""
    problems = []
    with open_text(file) as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.append(f"{file}:{number}: {_bad_utf8(raw, error)}")
    if problems:
        raise BadInput(problems)
    with open_text(file) as stream:
        return stream.read().removeprefix(BOM).decode("utf-8")


def _json(file: Path, columns: Collection[str]) -> Iterator[Record]:
    """A list of rows, an object that holds one list of rows, or an object per line."""
    first, more = _first_line(file)
    if not first.startswith(b"["):
        whole = not _json_line(first)[1]  # the first line is an object
        if more and (whole or first.endswith(b"}")):
            yield from _jsonl(file)
            return
    text = _text_of(file)
    suspicious = "\\ud" in text.lower()
    for row, value in enumerate(_rows_of(file, _json_value(file, text), columns), start=1):
        content, problem = _as_row(value, suspicious)
        yield Record(row, None, content, problem)


def _first_line(file: Path) -> tuple[bytes, bool]:
    """The first line that is not blank, stripped, and whether another one follows."""
    with open_text(file) as stream:
        lines = (raw.removeprefix(BOM).strip() for raw in stream)
        filled = (line for line in lines if line)
        return next(filled, b""), next(filled, None) is not None


def _json_value(file: Path, text: str) -> Any:
    if not text.strip():
        return []
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        spot = f"{file}:{error.lineno}: not valid JSON at column {error.colno}"
        raise BadInput(f"{spot}: {error.msg}: {_around(text, error.pos)}") from None
    except RecursionError:
        raise BadInput(f"{file}: not readable JSON: nested too deeply") from None
    except ValueError as error:
        raise BadInput(f"{file}: not valid JSON: {error}") from None


def _rows_of(file: Path, value: Any, columns: Collection[str]) -> Sequence[Any]:
    """The rows of a whole JSON file: ``[...]``, ``{"data": [...]}`` or one row."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if value and all(isinstance(v, dict) and v and "".join(v).isdigit() for v in value.values()):
        raise BadInput(
            f"{file}: holds columns ({', '.join(list(value)[:5])}), not rows; write a list of "
            'objects (pandas: to_json(FILE, orient="records"))'
        )
    if not value.keys().isdisjoint(columns):
        return [value]
    lists = [key for key, item in value.items() if _is_list_of_rows(item)]
    if len(lists) > 1:
        raise BadInput(
            f"{file}: holds several lists of rows ({', '.join(lists)}); write each into a file of "
            "its own"
        )
    rows: Sequence[Any] = value[lists[0]] if lists else [value]
    return rows


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _header(file: Path, delimiter: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Column names of a csv file, and an iterator of (line, fields) over the rows behind them."""
    csv.field_size_limit(sys.maxsize)  # the default refuses a text of 128 kB
    rows = _fields(file, csv.reader(_lines(file), delimiter=delimiter, strict=True))
    _, names = next(rows, (0, []))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{file}:1: duplicate column {twice[0]!r} in the header; rename one")
    if not any(names):
        raise BadInput(f"{file}:1: no header; the first line names the columns")
    return names, rows


def _lines(file: Path) -> Iterator[str]:
    """Lines at newlines only: ``str.splitlines`` would also cut at characters inside a field."""
    with open_text(file) as lines:
        for number, raw in enumerate(lines, start=1):
            raw = raw.removeprefix(BOM) if number == 1 else raw
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{file}:{number}: {_bad_utf8(raw, error)}") from None


def _fields(file: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every csv row that is not blank."""
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        what = (
            'a quote (") is opened and never closed' if "end of data" in str(error) else str(error)
        )
        raise BadInput(f'{file}:{line}: not valid csv: {what}; write "" for a quote') from None


def _csv(file: Path, delimiter: str) -> Iterator[Record]:
    names, rows = _header(file, delimiter)
    for row, (line, fields) in enumerate(rows, start=1):
        problem = None
        if len(fields) != len(names):
            problem = (
                f"has {len(fields)} fields where the header has {len(names)} "
                f"({', '.join(names)}): {shorten(fields)}; put text with commas in quotes"
            )
        yield Record(row, line, {} if problem else dict(zip(names, fields, strict=True)), problem)
