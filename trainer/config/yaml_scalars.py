"""Values of YAML scalars in the core schema of YAML 1.2. Imports no torch."""

from __future__ import annotations

import math
import re
from typing import Any

TAG = "tag:yaml.org,2002:"
NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)"
)
UNCLEAR = re.compile(r"[-+]?(?:0[0-9_]+|[0-9][0-9_]*_[0-9_]*(?:\.[0-9_]*)?)")
_MAX_DIGITS = 20  # the 19 digits of 2**63, and a sign


def plain_value(text: str) -> Any:
    """Parse a scalar without quotes and tag; raises ``ValueError``."""
    if NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if UNCLEAR.fullmatch(text):
        digits = text.replace("_", "")
        number = re.sub(r"^([-+]?)0+(?=\d)", r"\1", digits)
        raise ValueError(
            f"{shown(text)} is read differently by different versions of YAML; write "
            f'{shown(number)} or, for text, put it in quotes: "{shown(text)}"'
        )
    if INT.fullmatch(text):
        return _integer(text)
    if FLOAT.fullmatch(text):
        return _number(text)
    return _text(text)


def tagged_value(tag: str | None, text: str) -> Any:
    """Parse a scalar with quotes or a tag; raises ``ValueError``."""
    if tag in (None, TAG + "str"):
        return _text(text)
    patterns = {"int": INT, "float": FLOAT, "bool": _BOOL, "null": NULL}
    kind = str(tag).removeprefix(TAG)
    if kind not in patterns:
        raise ValueError(f"tag {shown(tag)} is not supported; remove it")
    if not patterns[kind].fullmatch(text):
        raise ValueError(f"!!{kind} {shown(text)}: is not of that type; remove the tag")
    return _number(text) if kind == "float" else plain_value(text)


def _integer(text: str) -> int:
    number = int(text, 0) if len(text) <= _MAX_DIGITS else 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{shown(text)} is too large; integers have 64 bits")
    return number


def _number(text: str) -> float:
    lower = text.lower()
    number = float(lower.replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(number) and "inf" not in lower:
        raise ValueError(f"{shown(text)} is too large; write .inf for infinity")
    return number


def _text(text: str) -> str:
    if bad := re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{shown(text)} holds {bad[0]!a}, which is not text; remove it")
    return text


def shown(text: str | None, width: int = 40) -> str:
    short = str(text).replace(TAG, "!!")
    short = short if len(short) <= width else short[: width - 3] + "..."
    return short if short.isprintable() else ascii(short)
