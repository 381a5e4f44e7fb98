"""What every section of the run file is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    """In Python true is 1; in a run file it is a mistake."""
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
# A name becomes a folder and a metric's prefix: letters, digits, '.', '_' and '-'.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


class Section(BaseModel):
    """A part of the run file: unknown keys are refused, values never change after loading."""

    # A setting whose name is a word of Python (``from``) has an alias; people see that alone.
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


SectionT = TypeVar("SectionT", bound=Section)


def checked(section: SectionT, problems: Sequence[str]) -> SectionT:
    """A section, unless a check across its settings found problems: one ``setting: text`` each."""
    if problems:
        raise ValueError("\n".join(problems))
    return section


def parse_bytes(size: Any) -> int:
    """``24GB``, ``500 MB`` or ``1.5TB`` as a number of bytes; units are powers of ten.

    Raises:
        ValueError: if it is not written so.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", str(size))
    if match is None:
        raise ValueError(f"{size!r} is no size; write a number and KB, MB, GB or TB, as 24GB")
    return int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2])))
