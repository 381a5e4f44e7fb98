"""Base class of the sections of the run file, and the types of their values."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)


def _no_bool(value: Any) -> Any:
    """Refuse true and false, which Python accepts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


Number = BeforeValidator(_no_bool)
PositiveInt = Annotated[int, Number, Field(gt=0)]
NonNegativeInt = Annotated[int, Number, Field(ge=0)]
PositiveFloat = Annotated[float, Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Number, Field(ge=0, le=1, allow_inf_nan=False)]
ShareBelowOne = Annotated[float, Number, Field(ge=0, lt=1, allow_inf_nan=False)]
# A name becomes a folder and the prefix of a metric.
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80, json_schema_extra={"format": "name"}
    ),
]


#: Maximum length of a path, and of a name in it, on Linux, in bytes.
_MAX_PATH, _MAX_FILE_NAME = 4095, 255
_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^{}]*)\})")


def expand_path(value: str) -> str:
    """Replace ``~``, ``$NAME`` and ``${NAME}`` in a path, as a shell does; ``$$`` is a ``$``.

    Raises:
        ValueError: a variable is not set, a user does not exist, or the path is not valid.
    """
    shown = _short(value)
    names = [a or b for dollar, a, b in _VARIABLE.findall(value) if not dollar]
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise ValueError(
            f"{shown}: the environment variable {unset[0]!r} is not set; set it, or write the "
            "path in full"
        )
    path = _VARIABLE.sub(lambda match: match[1] or os.environ[match[2] or match[3]], value)
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError(f"{shown}: there is no such user; write the path in full, or ./~NAME")
    check_path(path)
    return path


def check_path(path: str) -> None:
    """Raise ``ValueError`` if a path contains a control character or is too long."""
    if bad := re.search("[\0-\x1f\x7f\ud800-\udfff]", path):
        raise ValueError(f"{_short(path)} holds {bad[0]!a}, which no path may; remove it")
    names = map(os.fsencode, path.split("/"))
    if len(os.fsencode(path)) > _MAX_PATH or any(len(name) > _MAX_FILE_NAME for name in names):
        raise ValueError(
            f"{_short(path)} is too long for a path; {_MAX_PATH} bytes fit, {_MAX_FILE_NAME} in a "
            "name"
        )


def _short(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")


#: A path, a glob or a hub id. ``$`` is escaped in the saved run file, so that reading it again does
#: not expand variables a second time.
PathText = Annotated[
    str,
    AfterValidator(expand_path),
    PlainSerializer(lambda path: path.replace("$", "$$"), when_used="json"),
    Field(json_schema_extra={"format": "path"}),
]

_FLAG = TypeAdapter(bool)


def is_true(value: Any) -> bool:
    """Whether an unchecked value means true for pydantic: true, yes, on, 1."""
    try:
        return _FLAG.validate_python(value)
    except ValidationError:
        return False


class Section(BaseModel):
    """A section of the run file: unknown keys are errors, values are immutable."""

    # A setting that is a Python keyword (``from``) has an alias, which is its name in the run file.
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


SectionT = TypeVar("SectionT", bound=Section)


def checked(section: SectionT, problems: Sequence[str]) -> SectionT:
    """Return the section; raise ``ValueError`` if there are problems: ``setting: text`` each."""
    if problems:
        raise ValueError("\n".join(problems))
    return section


def parse_bytes(size: Any) -> int:
    """Parse ``24GB``, ``500 MB`` or ``1.5TB`` into bytes (powers of ten); raises ``ValueError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", str(size))
    if match is None:
        raise ValueError(f"{size!r} is no size; write a number and KB, MB, GB or TB, as 24GB")
    return int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2])))
