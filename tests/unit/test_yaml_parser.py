"""YAML as people mean it: the core schema of YAML 1.2, its limits, and damaged run files."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.preflight import check_result
from launch.submit import array_tasks
from tests.unit.test_config import GOOD
from trainer.config import dump, load, yaml_parser
from trainer.config.yaml_parser import YamlError, parse
from trainer.config.yaml_source import saved
from trainer.runtime.errors import BadInput
from trainer.tracking.run_metadata import RunMetadata

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("yes", "no", "on", "off", "Y", "n", "1:30", "2020-01-01")],
        *[
            (word, word)
            for word in ("2001-99-99", "0b1", "=", "1e", "1.2.3", "+", ".", "0x", "08a")
        ],
        *[(word, None) for word in ("", "~", "null", "Null")],
        *[(word, True) for word in ("true", "True", "TRUE")],
        *[("false", False), ("'true'", "true"), ("!!str 12", "12"), ("!!float 3", 3.0)],
        *[("12", 12), ("-3", -3), ("+5", 5), ("0", 0), ("0x1F", 31), ("0o17", 15)],
        *[(".5", 0.5), ("5.", 5.0), ("1e3", 1000.0), ("1E-3", 0.001), ("-1.5e+2", -150.0)],
        *[(".inf", math.inf), ("-.INF", -math.inf), ("[1, a]", [1, "a"]), ("{1: x}", {"1": "x"})],
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
        ("{a: &x {b: 1}, c: *x}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("{a: &x {b: 1}, c: {<<: [*x, {b: 2, d: 3}]}}", {"a": {"b": 1}, "c": {"b": 1, "d": 3}}),
    ],
)
def test_values(text: str, value: Any) -> None:
    data = parse(text).data
    assert data == value
    assert type(data) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 010", r'line 1: a: 010 is read differently .*; write 10 or, .* quotes: "010"'),
        ("a: -007", "write -7 or"),
        ("a: 1_000", "write 1000 or"),
        ("a: 1_0.5", "write 10.5 or"),
        ("\na: &a [*a]", r"line 2: not valid YAML: alias \*a is used inside itself"),
        ("a: *b", r"not valid YAML: alias \*b is not defined"),
        ("a: !!int x", "a: !!int x: is not of that type"),
        ("a: !!timestamp 2020-01-01", "tag !!timestamp is not supported"),
        ("a: !!set {b}", "tag !!set is not supported"),
        ("a: " + "9" * 5000, r"a: 9+\.\.\. is too large; integers have 64 bits"),
        ("a: 9223372036854775808", "is too large"),
        ("a: 1e999", "1e999 is too large"),
        ('a: "b\\0c"', "which is not text; remove it"),
        ("a: \udcff", "line 1: holds half a character"),
        ("[" * 1000, "nested deeper than 40 levels"),
        (BOMB, "its aliases make more than 100,000 values"),
        ("x\n" * (yaml_parser.MAX_BYTES // 2 + 1), "is longer than"),
        ("[" + "a," * 300_000 + "]", "more than 100,000 values"),
        ("a: 1\na: 2\nb: {c: 1, c: 2}", "line 2: a: duplicate key; .*line 3: b.c: duplicate key"),
        ("[a]: 1", "a key must be text"),
        ("a: {{ text }}", "a key must be text, .*; put a text with braces in quotes"),
        ("a:\n\tb: 1", "line 2: not valid YAML: .*; indent with spaces, not with tabs"),
        ("a: *.jsonl", r"not valid YAML: .*; put a text that begins with \* or & in quotes"),
        ("a: Text: {text}", "not valid YAML: .*; put a text with a colon in quotes"),
        ("a: {text} x", "not valid YAML: .*; put a text with braces, .* in double quotes"),
    ],
)
def test_invalid_input_is_refused(text: str, words: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse(text)
    message = "; ".join(
        f"line {line}: {'.'.join(map(str, path))}: {text}".replace(": : ", ": ")
        for path, line, text in caught.value.problems
    )
    assert re.search(words, message), message


@pytest.mark.parametrize(
    "text", ["d: &d {x: 1}\na:\n  x: 2\n  <<: *d", "d: &d {x: 1}\na:\n  <<: *d\n  x: 2"]
)
def test_a_setting_beside_a_merge_has_its_own_line(text: str) -> None:
    document = parse(text)
    assert document.data["a"] == {"x": 2}
    assert document.lines["a", "x"] == 1 + text.split("\n").index("  x: 2")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
    | st.sampled_from(
        ["010", "1e3", "0o17", "1_000", "yes", "~", "1:30", ".5", "<<", "2020-01-01"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1~", max_size=3), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(PLAIN, st.booleans())
def test_written_files_are_read_by_yaml_1_1_as_well(value: Any, one_line: bool) -> None:
    text = yaml_parser.dump(value, one_line=one_line)
    assert parse(text).data == value
    assert yaml.safe_load(text) == value
    assert not one_line or "\n" not in text


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_choices_are_text_as_they_are_written(tmp_path: Path) -> None:
    """A row that holds 01 has the choice 01, which a number would have turned into 1."""
    words = ["01", "no", "1.10", "1e3", "true", "2020-01-01", "0x10"]
    path = write(tmp_path, GOOD.replace("[a, b]", f"[{', '.join(words)}]"))
    assert load(path).tasks[0].choices == words
    assert load(write(tmp_path, dump(load(path)))).tasks[0].choices == words
    path = write(tmp_path, GOOD)
    assert load(path, ["tasks.triage.choices=[01, .5]"]).tasks[0].choices == ["01", ".5"]
    assert load(path, ["tasks.triage.choices[1]=1.0"]).tasks[0].choices == ["a", "1.0"]


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("off", False), ("true", True)])
def test_flags_may_be_words(tmp_path: Path, word: str, value: bool) -> None:
    run = load(write(tmp_path, GOOD), [f"tasks.triage.append_eos={word}"])
    assert run.tasks[0].append_eos is value


def test_a_flag_that_is_off_changes_no_default(tmp_path: Path) -> None:
    (prompt, _) = load(write(tmp_path, GOOD), ["prompts.one.init={vocab: yes, zero: no}"]).prompts
    assert (prompt.relative_learning_rate, prompt.learning_rate) == (0.1, None)


ODD = [
    *("&a [*a]", "*no", "2001-99-99", "!!int x", "!!set {a}", "9" * 5000, "1e999", ".inf", ".nan"),
    *("~", "no", "010", "1:30", "1_000", "''", "[", "]", "{", "[" * 1000, "{a: " * 90, "- ", "? "),
    *("[[1]]", "{}", "[]", "<<: *x", '"\\0"', "'" + "x" * 5000 + "'", "~nosuchuser/x", "${NOPE}"),
    *(
        "a/" * 3000,
        '"a\\nb"',
        "hf://x",
        "[a",
        "true",
        "-1",
        "0",
        "1.5",
        "|",
        "!x",
        "---",
        "=",
        "<<",
    ),
    *("{a: 1, a: 2}", "{? [a] : b}", "{1: 2}", "{from: 3}", "[1, 1.0]", "{random: 2}", "{grid: 1}"),
]
SETTINGS = [
    "training.steps",
    "prompts.one.init",
    "prompts[0].sweep",
    "tasks[0]",
    "a[9]",
    "tasks[²]",
]


def mutated(text: str, draw: random.Random) -> str:
    """A run file with a value, a line or a part of it replaced."""
    for _ in range(draw.randrange(1, 4)):
        kind = draw.randrange(3)
        if kind == 0:
            spots = [
                spans.span(1) for spans in re.finditer(r"(?:: |- |, |\[)([^\s,\[\]{}#]+)", text)
            ]
            start, stop = draw.choice(spots or [(0, 0)])
            text = text[:start] + draw.choice(ODD) + text[stop:]
        elif kind == 1:
            lines = text.split("\n")
            at = draw.randrange(len(lines))
            line = draw.choice([" " * draw.randrange(6) + lines[at].strip(), draw.choice(lines)])
            lines[at] = draw.choice(["", line, f"x: {draw.choice(ODD)}"])
            text = "\n".join(lines)
        else:
            at = draw.randrange(len(text) + 1)
            text = text[:at] + chr(draw.randrange(1, 0x250)) + text[at + draw.randrange(4) :]
    return text


def test_damaged_run_files_are_read_or_refused(tmp_path: Path) -> None:
    """Never another exception; what is read can be written and read again."""
    swept = GOOD.replace("num_virtual_tokens: 5", "sweep: {seed: [1, 2], steps: [3, 4]}")
    refused = 0
    for seed in range(400):
        draw = random.Random(seed)
        path = write(tmp_path, mutated(draw.choice([GOOD, swept]), draw))
        overrides = [f"{draw.choice(SETTINGS)}={draw.choice(ODD)}"] if seed % 4 == 0 else []
        try:
            run = load(path, overrides)
        except BadInput as error:
            refused += 1
            "\n".join(error.problems).encode()
        else:
            assert load(write(tmp_path, dump(run))) == run
    assert 200 < refused < 400


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]", "[" * 1000, "a: 2001-99-99\na: 1", "a: !!int x"]
)
def test_damaged_run_files_of_finished_runs_are_refused(tmp_path: Path, text: str) -> None:
    """``status``, ``sync`` and ``generate`` read them, and so does the report."""
    path = write(tmp_path, text)
    with pytest.raises(BadInput, match=r"run\.yaml"):
        check_result(str(tmp_path))
    assert saved(path) == {}
    assert RunMetadata(tmp_path).settings == {}


@pytest.mark.parametrize("value", ["&a [*a]", "[1, 010]", "[" * 1000, "!!int x", BOMB])
def test_damaged_lists_of_a_job_array_are_refused(value: str) -> None:
    with pytest.raises(BadInput, match="--array"):
        array_tasks([f"training.seed={value}"], "runs/x")
