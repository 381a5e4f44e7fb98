"""Arrow columns -> the values that the same rows have in JSON Lines. Imports no torch.

A table has one type per column, and that type shows in its values: an object has the keys of all
rows, a float32 is widened, a date is an object of Python. Here every type either gets the value
that a JSON file would hold, or is refused with the column and its type:

    boolean, integers, text, lists     as they are
    float16, float32                   the shortest number that reads back as the same value: 36.6
    decimal                            text with all digits of its scale: "12.30"; refused inside
                                       lists and objects
    date, time, timestamp              ISO 8601 text: "2024-05-01", "2024-05-01T10:00:00+00:00"
    struct                             an object without the keys that are null
    dictionary, run-end encoded        the values they stand for
    JSON (datasets' Json feature)      the value that the text holds
    ClassLabel of datasets             the name of the class
    duration, binary, map, union, ...  refused

What a table has lost cannot be restored: a null that a row itself had inside an object, and that
1 was an integer where another row has 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np

from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json

#: Of a feature of ``datasets``, as its JSON form names it: what a column means beside its type.
Feature = Any


def column_values(column: Any, name: str, feature: Feature = None, *, keep: bool = False) -> Any:
    """The values of one column of a record batch, as a JSON file would hold them.

    Args:
        column: ``pyarrow.Array``.
        name: of the column, for messages.
        feature: the column's feature of ``datasets`` in its JSON form, if the table has features.
        keep: the outermost objects of the column keep keys that are null.

    Raises:
        BadInput: a value has a type that no template can write, or is damaged.
    """
    try:
        return _values(column, name, feature, keep)
    except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"column {name!r} of type {column.type}: {reason}") from None


def class_names(feature: Feature) -> list[str] | None:
    """The class names of a ClassLabel column, or of a column of lists of them."""
    while isinstance(feature, Mapping) and feature.get("_type") != "ClassLabel":
        feature = _item_feature(feature)
    return list(feature["names"]) if isinstance(feature, Mapping) else None


def is_plain(feature: Feature) -> bool:
    """Whether a column of text or numbers means what its Arrow type says."""
    return feature is None or (isinstance(feature, Mapping) and feature.get("_type") == "Value")


def _values(array: Any, name: str, feature: Feature, keep: bool) -> list[Any]:
    from pyarrow import compute, types

    kind = array.type
    if getattr(kind, "extension_name", None) == "arrow.json":
        feature, array = {"_type": "Json"}, array.storage
        kind = array.type
    if types.is_dictionary(kind):
        return _values(array.dictionary_decode(), name, feature, keep)
    if types.is_run_end_encoded(kind):
        return _values(compute.run_end_decode(array), name, feature, keep)
    if _is_list(kind):
        return _lists(array, name, feature, keep)
    if types.is_struct(kind):
        return _objects(array, name, feature, keep)
    special = isinstance(feature, Mapping) and feature.get("_type")
    if special == "ClassLabel" and types.is_integer(kind):
        return _names(array.to_pylist(), feature["names"])
    if special == "Json" and _is_text(kind):
        return _each(_json, array.to_pylist())
    if types.is_timestamp(kind) or types.is_time(kind):
        return _times(array)
    convert = _converter(kind)
    if convert is None:
        if array.null_count == len(array):
            return [None] * len(array)
        raise BadInput(
            f"column {name!r} has type {kind}, which is neither text nor a number; "
            "cast it to one of these, or leave it out"
        )
    return _each(convert, array.to_pylist())


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """How one value of a simple type is changed; None for types that are refused."""
    from pyarrow import types

    same = (types.is_null, types.is_boolean, types.is_integer, types.is_float64, _is_text)
    if any(test(kind) for test in same):
        return _same
    if types.is_float32(kind):
        return _shortest(np.float32)
    if types.is_float16(kind):
        return _shortest(np.float16)
    if types.is_decimal(kind):
        return _decimal
    return _iso if types.is_date(kind) else None


def _each(convert: Callable[[Any], Any], values: list[Any]) -> list[Any]:
    if convert is _same:
        return values
    return [None if value is None else convert(value) for value in values]


def _same(value: Any) -> Any:
    return value


def _shortest(width: Any) -> Callable[[Any], float]:
    """The float whose text is the shortest that reads back as the same value of that width."""
    return lambda value: float(str(width(value)))


def _decimal(value: Decimal) -> str:
    return format(value, "f")  # str() writes 0E-8


def _iso(value: date | time) -> str:
    return value.isoformat()


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"holds JSON that is damaged: {error}") from None


def _names(values: list[Any], names: Sequence[str]) -> list[str | None]:
    found: list[str | None] = []
    for value in values:
        if value is not None and not 0 <= value < len(names):
            raise ValueError(
                f"{value} is not one of its {len(names)} classes (-1: not labelled); remove such "
                "rows"
            )
        found.append(None if value is None else str(names[value]))
    return found


def _times(array: Any) -> list[str | None]:
    """ISO text of timestamps and times of day; nanoseconds are kept where there are any."""
    import pyarrow as pa
    from pyarrow import types

    kind = array.type
    if kind.unit != "ns":
        return _each(_iso, array.to_pylist())
    nanos = array.cast(pa.int64()).to_pylist()
    micros = [None if value is None else value // 1000 for value in nanos]
    shorter = pa.timestamp("us", kind.tz) if types.is_timestamp(kind) else pa.time64("us")
    found: list[str | None] = []
    for whole, value in zip(pa.array(micros, shorter).to_pylist(), nanos, strict=True):
        if value is None or value % 1000 == 0:
            found.append(None if value is None else _iso(whole))
            continue
        text = whole.isoformat(timespec="microseconds")
        end = text.index(".") + 7
        found.append(f"{text[:end]}{value % 1000:03d}{text[end:]}")
    return found


def _lists(array: Any, name: str, feature: Feature, keep: bool) -> list[list[Any] | None]:
    from pyarrow import compute

    items = iter(_inner(array.flatten(), name, _item_feature(feature), keep))
    lengths = compute.list_value_length(array).to_pylist()
    valid = array.is_valid().to_pylist()
    return [
        [next(items) for _ in range(length)] if there else None
        for length, there in zip(lengths, valid, strict=True)
    ]


def _objects(array: Any, name: str, feature: Feature, keep: bool) -> list[dict[str, Any] | None]:
    """Structs as objects. A key that only other rows have is null here: it is left out."""
    keys = [field.name for field in array.type]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadInput(f"column {name!r} has two fields named {twice!r}; rename one")
    columns = [
        _inner(array.field(i), f"{name}.{key}", _field_feature(feature, key), False)
        for i, key in enumerate(keys)
    ]
    valid = array.is_valid().to_pylist()
    rows = zip(*columns, strict=True) if columns else ((),) * len(array)
    return [
        {k: v for k, v in zip(keys, row, strict=True) if keep or v is not None} if there else None
        for there, row in zip(valid, rows, strict=True)
    ]


def _inner(array: Any, name: str, feature: Feature, keep: bool) -> list[Any]:
    """Values inside lists and objects, which have to be values of JSON."""
    from pyarrow import types

    if types.is_decimal(array.type) and array.null_count < len(array):
        raise BadInput(f"column {name!r} has type {array.type} inside a list or object; cast it")
    values = _values(array, name, feature, keep)
    if types.is_floating(array.type) and not all(v is None or math.isfinite(v) for v in values):
        raise BadInput(f"column {name!r} holds NaN or infinity, which JSON has not; make it null")
    return values


def _item_feature(feature: Feature) -> Feature:
    """The feature of the items of a list: ``{"_type": "List", "feature": ...}`` or ``[...]``."""
    if isinstance(feature, list) and feature:
        return feature[0]
    if isinstance(feature, Mapping) and isinstance(feature.get("_type"), str):
        return feature.get("feature")
    return None


def _field_feature(feature: Feature, key: str) -> Feature:
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") == "Sequence" and isinstance(feature.get("feature"), Mapping):
        # datasets < 4: a sequence of objects is stored as an object of lists
        return {"_type": "List", "feature": feature["feature"].get(key)}
    return feature.get(key)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return any(
        test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view)
    )


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    tests = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(test(kind) for test in tests)
