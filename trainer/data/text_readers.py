"""Read text files as records, with the line of every mistake. Imports no torch.

``datasets`` and Arrow seldom report where a file is malformed, and convert values silently: a
column of dates becomes timestamps, a csv field ``NA`` becomes null, a short csv line is padded.
This module, ``csv_reader`` and ``json_reader`` return every value as written. ``table_readers``
reads tables.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from trainer.runtime.errors import BadInput

#: Suffixes; each may be followed by ``GZIP``.
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
GZIP = ".gz"
BOM = b"\xef\xbb\xbf"
#: First bytes of files that are often given the suffix of a text format.
_SIGNATURES = {
    b"\xff\xfe": "it looks like UTF-16; save it as UTF-8",
    b"\xfe\xff": "it looks like UTF-16; save it as UTF-8",
    b"\x1f\x8b": "it is compressed with gzip; add .gz to its name",
    b"PK\x03\x04": "it is an Excel workbook or a zip archive; save it as .csv, or unpack it",
    b"PAR1": "it is a parquet file; name it .parquet",
}


class FileRecord(NamedTuple):
    """One row with the values of the file, or its problem.

    Attributes:
        row: number of the row, from 1, counting malformed rows.
        line: number of its line, from 1; None in formats without lines.
        values: column -> value; empty if there is a problem.
        problem: mistake and remedy, without the place.
    """

    row: int
    line: int | None
    values: dict[str, Any]
    problem: str | None = None


def format_of(file: str | Path) -> str:
    """Return the format by the suffix; ``.jsonl`` also for ``.ndjson`` and ``.jsonl.gz``."""
    file = Path(file)
    suffix = file.suffix.lower()
    if suffix == GZIP:
        inner = Path(file.stem).suffix.lower()
        suffix = inner if inner in TEXT_FORMATS else inner + suffix
    return ".jsonl" if suffix == ".ndjson" else suffix


@contextmanager
def open_text(file: Path) -> Iterator[IO[bytes]]:
    """Open a text file, decompressing ``.gz``, as bytes; raises ``BadInput`` if unreadable."""
    compressed = file.suffix.lower() == GZIP
    try:
        with gzip.open(file, "rb") if compressed else file.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{file}: is not a complete gzip file: {error}; compress it again") from None
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror or error}") from None


def place(path: str, row: int, line: int | None) -> str:
    """Name a row in messages: ``FILE:LINE`` in jsonl and txt, else ``FILE: row N``."""
    if line is None:
        return f"{path}: row {row}"
    one_per_line = format_of(path) in (".jsonl", ".txt")
    return f"{path}:{line}" if one_per_line else f"{path}: row {row} (line {line})"


def shorten(value: Any, length: int = 60) -> str:
    """``repr`` of a value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 4] + "..." + text[-1]


def read_txt(file: Path) -> Iterator[FileRecord]:
    """Read a text file: one row per line that is not blank, in a column ``text``."""
    row = 0
    with open_text(file) as lines:
        for number, raw in enumerate(lines, start=1):
            raw = raw.removeprefix(BOM) if number == 1 else raw
            if not raw.strip():
                continue
            row += 1
            try:
                yield FileRecord(row, number, {"text": raw.decode("utf-8").rstrip("\r\n")})
            except UnicodeDecodeError as error:
                yield FileRecord(row, number, {}, bad_utf8(raw, error))


def bad_utf8(raw: bytes, error: UnicodeDecodeError) -> str:
    column = len(raw[: error.start].decode("utf-8", "replace")) + 1
    remedies = (text for start, text in _SIGNATURES.items() if raw.startswith(start))
    convert = "save it as UTF-8, for example by iconv -f windows-1252 -t utf-8 FILE > NEW_FILE"
    remedy = next(remedies, convert)
    before = raw[max(0, error.start - 15) : error.start].decode("utf-8", "ignore")
    spot = f" after {before!r}" if before else ""
    return f"not UTF-8 at column {column}: byte 0x{raw[error.start]:02x}{spot}; {remedy}"
