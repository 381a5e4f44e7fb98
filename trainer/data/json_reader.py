"""Read JSON files as records: an object per line, a list of objects, or an object with a list."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.data.text_readers import BOM, FileRecord, bad_utf8, open_text, shorten
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import check_depth


def read_jsonl(file: Path) -> Iterator[FileRecord]:
    with open_text(file) as lines:
        yield from json_lines(lines)


def json_lines(
    lines: Iterable[bytes], first_row: int = 1, first_line: int = 1
) -> Iterator[FileRecord]:
    """Parse JSON Lines; blank lines are skipped."""
    row = first_row - 1
    for number, raw in enumerate(lines, start=first_line):
        raw = raw.removeprefix(BOM) if number == 1 else raw
        if not raw.strip():
            continue
        row += 1
        values, problem = _json_line(raw)
        if problem and row == 1 and (raw.strip() == b"{" or raw.lstrip().startswith(b"[")):
            problem += (
                "; a JSON Lines file has one complete object per line (a list: name it .json)"
            )
            yield FileRecord(row, number, {}, problem)
            return  # every other line would repeat it
        yield FileRecord(row, number, values, problem)


def _json_line(raw: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return {}, bad_utf8(raw, error)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return (
            {},
            f"not valid JSON at column {error.colno}: {error.msg}: {_around(text, error.pos)}",
        )
    except RecursionError:
        return {}, "not readable JSON: nested too deeply"
    except ValueError as error:
        return {}, f"not valid JSON: {error}"
    return _as_row(value, surrogates="\\ud" in text.lower())


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's limit on the digits of an integer
        raise ValueError(
            f"an integer of {len(text):,} digits is too long; put it in quotes"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write null or a number")


#: Rejects NaN, Infinity and duplicate keys, of which ``json.loads`` keeps the last.
_DECODER = json.JSONDecoder(
    parse_constant=_no_constant, parse_int=_integer, object_pairs_hook=_object
)


def _around(text: str, position: int) -> str:
    start, end = max(0, position - 20), min(len(text), position + 20)
    if position >= len(text):
        return f"the line ends with {text[start:]!r}"
    return f"near {text[start:end]!r}"


def _as_row(value: Any, surrogates: bool) -> tuple[dict[str, Any], str | None]:
    """Return a value as (row, problem). ``surrogates``: its text contains escaped surrogates."""
    if not isinstance(value, dict):
        kind = {list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")
        return {}, f'is {kind}, {shorten(value)}; a row is an object: {{"column": value, ...}}'
    try:
        check_depth(value)
    except ValueError as error:
        return {}, f"not readable JSON: {error}"
    if surrogates:  # half a surrogate pair is valid JSON, but cannot be encoded as UTF-8
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


def _text_of(file: Path) -> str:
    """Read a file as text; report invalid UTF-8 with its line."""
    problems = []
    with open_text(file) as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.append(f"{file}:{number}: {bad_utf8(raw, error)}")
    if problems:
        raise BadInput(problems)
    with open_text(file) as stream:
        return stream.read().removeprefix(BOM).decode("utf-8")


def read_json_rows(file: Path, columns: Collection[str]) -> Iterator[FileRecord]:
    """Read a list of rows, an object with one list of rows, or an object per line."""
    first, more = _first_line(file)
    if not first.startswith(b"["):
        is_object = not _json_line(first)[1]
        if more and (is_object or first.endswith(b"}")):
            yield from read_jsonl(file)
            return
    text = _text_of(file)
    surrogates = "\\ud" in text.lower()
    for row, value in enumerate(_rows_of(file, _json_value(file, text), columns), start=1):
        content, problem = _as_row(value, surrogates)
        yield FileRecord(row, None, content, problem)


def _first_line(file: Path) -> tuple[bytes, bool]:
    """Return the first non-blank line, stripped, and whether another one follows."""
    with open_text(file) as stream:
        lines = (raw.removeprefix(BOM).strip() for raw in stream)
        filled = (line for line in lines if line)
        return next(filled, b""), next(filled, None) is not None


def _json_value(file: Path, text: str) -> Any:
    if not text.strip():
        return []
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}: not valid JSON at column {error.colno}"
        raise BadInput(f"{where}: {error.msg}: {_around(text, error.pos)}") from None
    except RecursionError:
        raise BadInput(f"{file}: not readable JSON: nested too deeply") from None
    except ValueError as error:
        raise BadInput(f"{file}: not valid JSON: {error}") from None


def _rows_of(file: Path, value: Any, columns: Collection[str]) -> Sequence[Any]:
    """Return the rows of a JSON document: ``[...]``, ``{"data": [...]}`` or one row."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if value and all(map(_is_column, value.values())):
        raise BadInput(
            f"{file}: holds columns ({', '.join(list(value)[:5])}), not rows; write a list of "
            'objects (pandas: to_json(FILE, orient="records"))'
        )
    if not value.keys().isdisjoint(columns):
        return [value]
    keys = [item.keys() for item in value.values() if isinstance(item, dict)]
    if 1 < len(value) == len(keys) and keys[0] and all(item == keys[0] for item in keys):
        raise BadInput(
            f"{file}: holds rows by their key ({', '.join(list(value)[:3])}, ...); write a list of "
            "objects: list(rows.values())"
        )
    lists = [key for key, item in value.items() if _is_list_of_rows(item)]
    if len(lists) > 1:
        raise BadInput(
            f"{file}: holds several lists of rows ({', '.join(lists)}); write each into a "
            "separate file"
        )
    rows: Sequence[Any] = value[lists[0]] if lists else [value]
    return rows


def _is_column(value: Any) -> bool:
    """Whether a value is a column: a list of scalars, or ``{"0": value, "1": ...}``."""
    if isinstance(value, list):
        return bool(value) and not any(isinstance(item, dict | list) for item in value)
    return isinstance(value, dict) and bool(value) and "".join(value).isdigit()


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
