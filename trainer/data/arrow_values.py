"""Convert Arrow columns to the values that the same rows have in JSON Lines. Imports no torch.

A table has one type per column, which changes the values that Python gets: an object has the keys
of all rows, a float32 is widened, a date is a Python object. This module converts them to the
values of a JSON file, or refuses the column:

    boolean, integers, text, lists     unchanged
    float16, float32                   the shortest number that parses to the same value: 36.6
    decimal                            text with all digits of its scale: "12.30"; refused inside
                                       lists and objects
    date, time, timestamp              ISO 8601 text: "2024-05-01", "2024-05-01T10:00:00+00:00"
    struct                             an object without the keys that are null
    dictionary, run-end encoded        the encoded values
    JSON (datasets' Json feature)      the parsed value
    ClassLabel of datasets             the name of the class
    duration, binary, map, union, ...  refused

Two distinctions do not exist in a table: between null and missing keys of an object, and between
1 and 1.0 if another row has 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json

#: A feature of ``datasets`` in JSON form, which gives the meaning of a column beyond its type.
Feature = Any


def column_values(column: Any, name: str, feature: Feature = None, *, keep: bool = False) -> Any:
    """Convert one column of a record batch to the values of a JSON file.

    Args:
        column: ``pyarrow.Array``.
        name: of the column, for messages.
        keep: the outermost objects of the column keep keys that are null.

    Raises:
        BadInput: the column has an unsupported type, or is damaged.
    """
    try:
        return _values(column, name, feature, keep)
    except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"column {name!r} of type {column.type}: {reason}") from None


def class_names(feature: Feature) -> list[str] | None:
    """Return the class names of a ClassLabel column, or of a column of lists of them."""
    while isinstance(feature, Mapping) and feature.get("_type") != "ClassLabel":
        feature = _item_feature(feature)
    return list(feature["names"]) if isinstance(feature, Mapping) else None


def is_plain(feature: Feature) -> bool:
    """Whether the values of a text or number column need no conversion."""
    return feature is None or (isinstance(feature, Mapping) and feature.get("_type") == "Value")


def is_supported(kind: Any, feature: Feature = None) -> bool:
    """Whether columns of an Arrow type can be converted; bytes of images, for example, cannot."""
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return True
    if types.is_struct(kind):
        return all(is_supported(field.type, _field_feature(feature, field.name)) for field in kind)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return is_supported(kind.value_type, feature)
    if _is_list(kind):
        return is_supported(kind.value_type, _item_feature(feature))
    is_time = types.is_timestamp(kind) or types.is_time(kind)
    return is_time or _is_simple(kind) or _converter(kind, feature) is not None


def _values(array: Any, name: str, feature: Feature, keep: bool) -> list[Any]:
    from pyarrow import compute, types

    kind = array.type
    if getattr(kind, "extension_name", None) == "arrow.json":
        return _values(array.storage, name, {"_type": "Json"}, keep)
    if types.is_dictionary(kind):
        return _values(array.dictionary_decode(), name, feature, keep)
    if types.is_run_end_encoded(kind):
        return _values(compute.run_end_decode(array), name, feature, keep)
    if _is_list(kind):
        return _lists(array, name, feature, keep)
    if types.is_struct(kind):
        return _objects(array, name, feature, keep)
    if types.is_timestamp(kind) or types.is_time(kind):
        return _times(array)
    convert = _converter(kind, feature)
    if convert is not None:
        return [None if value is None else convert(value) for value in array.to_pylist()]
    if not _is_simple(kind) and array.null_count < len(array):
        raise BadInput(
            f"column {name!r} has type {kind}, which is neither text nor a number; "
            "cast it to one of these, or leave it out"
        )
    return array.to_pylist()


def _converter(kind: Any, feature: Feature) -> Callable[[Any], Any] | None:
    """Return the conversion of non-null values; None if the type needs none."""
    from pyarrow import types

    special = isinstance(feature, Mapping) and feature.get("_type")
    if special == "ClassLabel" and types.is_integer(kind):
        return lambda value: _class_name(value, feature["names"])
    if special == "Json" and _is_text(kind):
        return _json
    if types.is_float32(kind) or types.is_float16(kind):  # the shortest text of that width
        width = np.float32 if types.is_float32(kind) else np.float16
        return lambda value: float(str(width(value)))
    if types.is_decimal(kind):
        return lambda value: format(value, "f")  # str() writes 0E-8
    return (lambda value: value.isoformat()) if types.is_date(kind) else None


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"holds JSON that is damaged: {error}") from None


def _class_name(value: int, names: list[str]) -> str:
    if not 0 <= value < len(names):
        raise ValueError(
            f"{value} is not one of its {len(names)} classes (-1: not labelled); remove such rows"
        )
    return str(names[value])


def _times(array: Any) -> list[str | None]:
    """Format timestamps and times of day as ISO 8601, with nanoseconds if they are not 0."""
    import pyarrow as pa
    from pyarrow import types

    kind = array.type
    if kind.unit != "ns":
        return [None if value is None else value.isoformat() for value in array.to_pylist()]
    nanoseconds = array.cast(pa.int64()).to_pylist()
    microseconds = [None if value is None else value // 1000 for value in nanoseconds]
    shorter = pa.timestamp("us", kind.tz) if types.is_timestamp(kind) else pa.time64("us")
    texts: list[str | None] = []
    for time, value in zip(pa.array(microseconds, shorter).to_pylist(), nanoseconds, strict=True):
        if value is None or value % 1000 == 0:
            texts.append(None if value is None else time.isoformat())
            continue
        text = time.isoformat(timespec="microseconds")
        end = text.index(".") + 7
        texts.append(f"{text[:end]}{value % 1000:03d}{text[end:]}")
    return texts


def _lists(array: Any, name: str, feature: Feature, keep: bool) -> list[list[Any] | None]:
    from pyarrow import compute

    items = iter(_inner(array.flatten(), name, _item_feature(feature), keep))
    lengths = compute.list_value_length(array).to_pylist()
    valid = array.is_valid().to_pylist()
    return [
        [next(items) for _ in range(length)] if is_valid else None
        for length, is_valid in zip(lengths, valid, strict=True)
    ]


def _objects(array: Any, name: str, feature: Feature, keep: bool) -> list[dict[str, Any] | None]:
    """Convert structs to objects; unless ``keep``, remove null keys, which other rows have."""
    keys = [field.name for field in array.type]
    if len(set(keys)) < len(keys):
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise BadInput(f"column {name!r} has two fields named {duplicate!r}; rename one")
    columns = [
        _inner(array.field(i), f"{name}.{key}", _field_feature(feature, key), False)
        for i, key in enumerate(keys)
    ]
    valid = array.is_valid().to_pylist()
    rows = zip(*columns, strict=True) if columns else ((),) * len(array)
    return [
        {k: v for k, v in zip(keys, row, strict=True) if keep or v is not None}
        if is_valid
        else None
        for is_valid, row in zip(valid, rows, strict=True)
    ]


def _inner(array: Any, name: str, feature: Feature, keep: bool) -> list[Any]:
    """Convert values inside lists and objects, which must be valid JSON."""
    from pyarrow import types

    if types.is_decimal(array.type) and array.null_count < len(array):
        raise BadInput(f"column {name!r} has type {array.type} inside a list or object; cast it")
    values = _values(array, name, feature, keep)
    if types.is_floating(array.type) and not all(v is None or math.isfinite(v) for v in values):
        raise BadInput(f"column {name!r} holds NaN or infinity, which JSON lacks; make it null")
    return values


def _item_feature(feature: Feature) -> Feature:
    """Return the feature of a list's items: ``{"_type": "List", "feature": ...}`` or ``[...]``."""
    if isinstance(feature, list) and feature:
        return feature[0]
    if isinstance(feature, Mapping) and isinstance(feature.get("_type"), str):
        return feature.get("feature")
    return None


def _field_feature(feature: Feature, key: str) -> Feature:
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") == "Sequence" and isinstance(feature.get("feature"), Mapping):
        # datasets < 4 stores a sequence of objects as an object of lists
        return {"_type": "List", "feature": feature["feature"].get(key)}
    return feature.get(key)


def _is_list(kind: Any) -> bool:
    return str(kind).startswith(
        ("list<", "large_list<", "fixed_size_list<", "list_view<", "large_list_view<")
    )


def _is_simple(kind: Any) -> bool:
    """Whether the values of a type are JSON values in Python."""
    from pyarrow import types

    simple = (types.is_null, types.is_boolean, types.is_integer, types.is_float64, _is_text)
    return any(test(kind) for test in simple)


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")
