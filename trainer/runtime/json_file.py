"""Read untrusted JSON, and write strict JSON.

Damaged, too large or too deeply nested files raise ``BadInput``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainer.runtime.errors import BadInput

#: Maximum nesting, because Python's parser and functions that use its result are recursive.
MAX_DEPTH = 200
MAX_BYTES = 1 << 26


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a JSON file.

    Raises:
        BadInput: the file is missing, unreadable, larger than ``max_bytes``, not UTF-8, not JSON,
            or nested deeper than ``MAX_DEPTH``. The message begins with the path.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: cannot be read: {reason}") from None
    if len(data) > max_bytes:
        raise BadInput(f"{path}: is larger than {max_bytes:,} bytes")
    try:
        return parse_json(data)
    except ValueError as error:
        raise BadInput(f"{path}: is not valid JSON: {error}") from None


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Parse a JSON file that contains an object; raises ``BadInput`` also for any other value."""
    value = read_json(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        names = {type(None): "null", list: "a list", str: "a string", bool: "a boolean"}
        kind = names.get(type(value), "a number")
        raise BadInput(f"{path}: must be a JSON object, not {kind}")
    return value


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` that raises a one-line ``ValueError`` for every failure.

    That includes text that is not UTF-8, integers of thousands of digits, and too deep nesting.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    check_depth(value)
    return value


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """``json.dumps`` with null for numbers that are not finite, which strict readers refuse."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def finite(value: Any) -> Any:
    """Return a JSON value with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_depth(value: Any) -> None:
    """Raise ``ValueError`` if a parsed value is nested deeper than ``MAX_DEPTH``."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
