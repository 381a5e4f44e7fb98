"""Every problem of a JSON file is a ``BadInput`` that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import MAX_DEPTH, read_json, read_json_object, to_json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (b"[1", "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b"[" * 100_000, "nested deeper than 200 levels"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested deeper than 200"),
        (b"9" * 5_000, "is not valid JSON"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"true", "must be a JSON object, not a boolean"),
        (b" " * 101, "is larger than 100 bytes"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_json_object(path, max_bytes=100 if words.endswith("bytes") else 1 << 20)
    (text,) = caught.value.problems
    assert text.startswith(f"{path}: ")
    assert words in text
    assert "\n" not in text


def test_valid_files(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"a": [1, {"b": null}]}')
    assert read_json_object(path) == read_json(path) == {"a": [1, {"b": None}]}
    for missing in (tmp_path / "none.json", tmp_path, Path("a\0b")):
        with pytest.raises(BadInput):
            read_json(missing)


def test_strict_readers_can_read_what_is_written(tmp_path: Path) -> None:
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "NaN", "e": True}}
    atomic_io.write_json(tmp_path / "d.json", value)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for text in (to_json(value), (tmp_path / "d.json").read_text()):
        parsed = json.loads(text, parse_constant=refuse)
        assert parsed == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN", "e": True}}
