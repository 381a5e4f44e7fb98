"""Small programs of one or two steps, described in words and written in several languages.

The same sentence can be followed by a Python ``def``, a Python ``lambda``, JavaScript, Lisp or
other words, so a prompt has to say which is wanted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LARGEST_NUMBER = 29


@dataclass(frozen=True)
class Operation:
    """One step on a value of ``kind``; ``{v}`` is the value and ``{n}`` the step's number.

    ``python`` and the others are expressions with ``{v}`` already in parentheses where needed.
    """

    kind: str
    phrases: tuple[str, ...]
    python: str
    javascript: str
    lisp: str
    said: str
    run: Callable[[Any, int], Any]
    stories: tuple[str, ...] = ()
    gives: str = ""  # the kind of the result, where it differs

    @property
    def has_number(self) -> bool:
        return "{n}" in self.python


OPERATIONS = {
    "add": Operation(
        "number",
        ("add {n} to {v}", "increase {v} by {n}", "raise {v} by {n}"),
        "{v} + {n}",
        "{v} + {n}",
        "(+ {v} {n})",
        "{n} is added",
        lambda v, n: v + n,
        ("{n} more arrive", "{n} are bought", "someone brings {n}"),
    ),
    "subtract": Operation(
        "number",
        ("subtract {n} from {v}", "take {n} away from {v}", "decrease {v} by {n}"),
        "{v} - {n}",
        "{v} - {n}",
        "(- {v} {n})",
        "{n} is taken away",
        lambda v, n: v - n,
        ("{n} are sold", "{n} get lost", "{n} are given away"),
    ),
    "multiply": Operation(
        "number",
        ("multiply {v} by {n}", "scale {v} by {n}", "make {v} {n} times as large"),
        "{v} * {n}",
        "{v} * {n}",
        "(* {v} {n})",
        "it is taken {n} times",
        lambda v, n: v * n,
        ("the stock grows to {n} times as many", "each is swapped for {n}"),
    ),
    "divide": Operation(
        "number",
        ("divide {v} by {n} and round down", "count how often {n} fits into {v}"),
        "{v} // {n}",
        "Math.floor({v} / {n})",
        "(floor {v} {n})",
        "it is divided by {n}",
        lambda v, n: v // n,
        ("they fill boxes of {n} and only full boxes count", "{n} friends share them"),
    ),
    "remainder": Operation(
        "number",
        ("take {v} modulo {n}", "find the remainder of {v} divided by {n}"),
        "{v} % {n}",
        "{v} % {n}",
        "(mod {v} {n})",
        "the rest after {n} is kept",
        lambda v, n: v % n,
        ("they fill boxes of {n} and only the rest counts",),
    ),
    "at_least": Operation(
        "number",
        ("take the larger of {v} and {n}", "make sure {v} is at least {n}"),
        "max({v}, {n})",
        "Math.max({v}, {n})",
        "(max {v} {n})",
        "it is at least {n}",
        lambda v, n: max(v, n),
        ("the stock is filled up to at least {n}",),
    ),
    "at_most": Operation(
        "number",
        ("take the smaller of {v} and {n}", "make sure {v} is at most {n}"),
        "min({v}, {n})",
        "Math.min({v}, {n})",
        "(min {v} {n})",
        "it is at most {n}",
        lambda v, n: min(v, n),
        ("there is room for {n} at most",),
    ),
    "square": Operation(
        "number",
        ("square {v}", "multiply {v} by itself"),
        "{v} ** 2",
        "{v} ** 2",
        "(expt {v} 2)",
        "it is squared",
        lambda v, n: v**2,
    ),
    "negate": Operation(
        "number",
        ("negate {v}", "flip the sign of {v}"),
        "-{v}",
        "-{v}",
        "(- {v})",
        "the sign is flipped",
        lambda v, n: -v,
    ),
    "exceeds": Operation(
        "number",
        ("check whether {v} is larger than {n}", "tell if {v} exceeds {n}"),
        "{v} > {n}",
        "{v} > {n}",
        "(> {v} {n})",
        "is it larger than {n}",
        lambda v, n: v > n,
        gives="truth",
    ),
    "upper": Operation(
        "text",
        ("write {v} in capitals", "turn {v} into upper case"),
        "{v}.upper()",
        "{v}.toUpperCase()",
        "(string-upcase {v})",
        "it is put in capitals",
        lambda v, n: v.upper(),
    ),
    "reverse": Operation(
        "text",
        ("reverse {v}", "turn {v} around"),
        "{v}[::-1]",
        "flip({v})",
        "(reverse {v})",
        "it is turned around",
        lambda v, n: v[::-1],
    ),
    "repeat": Operation(
        "text",
        ("repeat {v} {n} times", "write {v} {n} times in a row"),
        "{v} * {n}",
        "{v}.repeat({n})",
        "(repeat {v} {n})",
        "it is said {n} times",
        lambda v, n: v * n,
    ),
    "start": Operation(
        "text",
        ("keep the first {n} letters of {v}", "cut {v} after {n} letters"),
        "{v}[:{n}]",
        "{v}.slice(0, {n})",
        "(subseq {v} 0 {n})",
        "the first {n} letters stay",
        lambda v, n: v[:n],
    ),
    "end": Operation(
        "text",
        ("drop the first {n} letters of {v}", "start {v} after {n} letters"),
        "{v}[{n}:]",
        "{v}.slice({n})",
        "(subseq {v} {n})",
        "the first {n} letters go",
        lambda v, n: v[n:],
    ),
    "sort": Operation(
        "list",
        ("sort {v}", "put {v} in order"),
        "sorted({v})",
        "sort({v})",
        "(sort {v})",
        "it is put in order",
        lambda v, n: sorted(v),
    ),
    "head": Operation(
        "list",
        ("keep the first {n} items of {v}", "cut {v} after {n} items"),
        "{v}[:{n}]",
        "{v}.slice(0, {n})",
        "(take {v} {n})",
        "the first {n} items stay",
        lambda v, n: v[:n],
    ),
    "total": Operation(
        "list",
        ("sum up {v}", "add up all items of {v}"),
        "sum({v})",
        "sum({v})",
        "(sum {v})",
        "the items are added up",
        lambda v, n: sum(v),
        gives="number",
    ),
    "largest": Operation(
        "list",
        ("find the largest item of {v}", "take the maximum of {v}"),
        "max({v})",
        "Math.max(...{v})",
        "(maximum {v})",
        "the largest item is found",
        lambda v, n: max(v),
        gives="number",
    ),
}
KIND_NAMES = {
    "number": ("x", "the number x"),
    "text": ("x", "the text x"),
    "list": ("x", "the list x"),
}
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "number": (0, 7, 23, 58, 141),
    "text": ("", "word", "Quick test line"),
    "list": ([4], [3, 1, 2], [40, 9, 77, 5, 12, 31, 8, 66, 20, 15, 2, 90]),
}
GOODS = ("apples", "loaves", "books", "tickets", "eggs", "stamps", "coins", "lamps")
OWNERS = ("A farmer", "A shop", "A school", "A baker", "A library", "A club")


@dataclass(frozen=True)
class Step:
    """An operation with its number."""

    operation: str
    n: int

    @property
    def what(self) -> Operation:
        return OPERATIONS[self.operation]


Program = tuple[Step, ...]


def draw(rng: random.Random, numeric: bool = False) -> Program:
    """Draw a program of one or two steps whose kinds fit together.

    Programs with no number in them are few; they would fall into one split each, so a second step
    with a number follows or precedes.
    """
    while True:
        kind = "number" if numeric else rng.choice(("number", "number", "text", "list"))
        steps: list[Step] = []
        for _ in range(rng.choice((1, 2))):
            names = [
                name
                for name, op in OPERATIONS.items()
                if op.kind == kind and (op.stories or not numeric)
            ]
            name = rng.choice(names)
            low, high = (2, 9) if kind != "number" else (2, LARGEST_NUMBER)
            number = rng.randint(low, high) if OPERATIONS[name].has_number else 0
            steps.append(Step(name, number))
            kind = OPERATIONS[name].gives or kind
            if kind == "truth":
                break
        if any(step.n for step in steps):
            return tuple(steps)


def describe(rng: random.Random, program: Program) -> str:
    """Say the program as a request."""
    value = rng.choice(KIND_NAMES[program[0].what.kind])
    parts = []
    for step in program:
        parts.append(rng.choice(step.what.phrases).format(v=value, n=step.n))
        value = rng.choice(("the result", "that"))
    words = rng.choice((", then ", " and after that ")).join(parts)
    return words[0].upper() + words[1:] + "."


def story(rng: random.Random, program: Program) -> str:
    """Say a numeric program as something that happens."""
    parts = [rng.choice(step.what.stories).format(n=step.n) for step in program]
    start = f"{rng.choice(OWNERS)} has x {rng.choice(GOODS)}."
    happens = ", then ".join(parts)
    return f"{start} {happens[0].upper()}{happens[1:]}."


def _expression(program: Program, language: str) -> str:
    expression = "x"
    for index, step in enumerate(program):
        template: str = getattr(step.what, language)
        loose = language != "lisp" and index > 0 and " " in expression.split("(")[0]
        alone = template.startswith(("max(", "min(", "sum(", "sorted(", "Math.m", "sum", "sort"))
        if loose and not alone:
            expression = f"({expression})"
        expression = template.format(v=expression, n=step.n)
    return expression


@dataclass(frozen=True)
class Form:
    """A way to write a program, and the instructions that ask for it."""

    render: Callable[[Program], str]
    instructions: tuple[str, ...]


def _instructions(nouns: tuple[str, ...]) -> tuple[str, ...]:
    patterns = (
        "Write {np}.",
        "Turn the sentence into {np}.",
        "Translate this to {np}.",
        "Give {np} that does this.",
        "Express the task as {np}.",
        "Answer with {np}.",
        "Say it as {np}.",
        "Put the request into {np}.",
    )
    return tuple(pattern.format(np=noun) for noun in nouns for pattern in patterns)


FORMS = {
    "def": Form(
        lambda p: f"def f(x): return {_expression(p, 'python')}",
        _instructions(
            (
                "a named Python function",
                "a Python definition",
                "a def statement",
                "a Python function with def and return",
                "a function f defined in Python",
                "a one-line definition of f",
                "a Python def",
            )
        ),
    ),
    "lambda": Form(
        lambda p: f"lambda x: {_expression(p, 'python')}",
        _instructions(
            (
                "a Python lambda",
                "an anonymous Python function",
                "a lambda expression",
                "a nameless function in Python",
                "an inline Python expression",
            )
        ),
    ),
    "javascript": Form(
        lambda p: f"const f = (x) => {_expression(p, 'javascript')};",
        _instructions(
            (
                "a JavaScript function",
                "an arrow function",
                "code for the browser",
                "a JavaScript constant",
                "a script for a web page",
            )
        ),
    ),
    "lisp": Form(
        lambda p: f"(defun f (x) {_expression(p, 'lisp')})",
        _instructions(
            (
                "a Lisp function",
                "a defun form",
                "Lisp code",
                "a list expression in Lisp",
                "nested parentheses",
            )
        ),
    ),
    "words": Form(
        lambda p: "with x, " + ", then ".join(step.what.said.format(n=step.n) for step in p),
        _instructions(
            (
                "other words",
                "plain English",
                "a short explanation",
                "a paraphrase",
                "a simple sentence for a reader",
            )
        ),
    ),
}


def tests(program: Program) -> list[dict[str, Any]]:
    """Calls with the results that are right, found by running the steps."""
    cases = []
    for argument in EXAMPLES[program[0].what.kind]:
        value: Any = argument
        for step in program:
            value = step.what.run(value, step.n)
        cases.append({"args": [argument], "result": value})
    return cases
